"""A BM25 index over a corpus of short documents (library: bm25s, Lù 2024, arXiv 2407.03618)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bm25s
import numpy as np

from system.errors import EspalierError
from system.text import as_text

_TOKENS = r"(?u)\b\w+\b"  # unlike the usual pattern it keeps one-letter words and digits


class CorpusError(EspalierError, ValueError):
    """A corpus or a saved index that cannot be used; the message names the file, the line and the reason."""


@dataclass(frozen=True, slots=True)
class Document:
    id: str
    title: str
    text: str

    def __post_init__(self) -> None:
        """As an HTTP server can send it: a lone surrogate becomes U+FFFD."""
        for name in ("id", "title", "text"):
            object.__setattr__(self, name, as_text(getattr(self, name)))


@dataclass(frozen=True, slots=True)
class Hit:
    document: Document
    score: float


def read_corpus(path: str | Path) -> list[Document]:
    """Documents of a JSONL file of {"id", "title", "text"}; "title" may be missing."""
    path = Path(path)
    if not path.is_file():
        raise CorpusError(f"no such corpus: {path}")
    documents: list[Document] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                documents.append(_document(line, f"{path}:{number}"))
    return documents


class SearchIndex:
    """Ranked retrieval.  Equal scores rank by place in the corpus, so results are the same on any machine."""

    def __init__(self, documents: Sequence[Document], scorer: bm25s.BM25):
        self.documents = documents
        self._scorer = scorer

    @classmethod
    def build(cls, documents: Iterable[Document]) -> SearchIndex:
        """Index title and text together.  Raises CorpusError without a single word to index."""
        documents = list(documents)
        tokens = _tokenize([f"{document.title} {document.text}" for document in documents])
        if not any(tokens):
            raise CorpusError("the corpus has no document with a word in it")
        scorer = bm25s.BM25(backend="numpy")
        scorer.index(tokens, show_progress=False)
        return cls(documents, scorer)

    @classmethod
    def cached(cls, documents: Sequence[Document], directory: str | Path) -> SearchIndex:
        """The index of ``documents`` whose scores (NumPy arrays, JSON) are kept in ``directory``; built and
        saved there if it is missing or another's."""
        directory = Path(directory)
        manifest, scores = directory / "manifest.json", str(directory / "bm25")
        digest = _digest(documents)
        if manifest.is_file() and json.loads(manifest.read_text()).get("corpus") == digest:
            return cls(documents, bm25s.BM25.load(scores, load_corpus=False, mmap=True))
        index = cls.build(documents)
        directory.mkdir(parents=True, exist_ok=True)
        manifest.unlink(missing_ok=True)
        index._scorer.save(scores, show_progress=False)
        manifest.write_text(json.dumps({"corpus": digest}))  # last: it says that the rest is whole
        return index

    def search(self, query: str, top_k: int) -> list[Hit]:
        """At most ``top_k`` documents that share a word with ``query``, best first."""
        known = self._scorer.vocab_dict
        words = [word for word in _tokenize([query])[0] if word in known]
        if not words or top_k <= 0:
            return []
        scores = self._scorer.get_scores(words)  # f32[documents]
        top_k = min(top_k, len(scores))
        threshold = np.partition(scores, len(scores) - top_k)[len(scores) - top_k]
        candidates = np.flatnonzero((scores >= threshold) & (scores > 0))  # ascending: the corpus' order
        best = candidates[np.argsort(-scores[candidates], kind="stable")[:top_k]]
        return [Hit(self.documents[i], float(scores[i])) for i in best]


def _tokenize(texts: list[str]) -> list[list[str]]:
    tokens = bm25s.tokenize(
        texts, stopwords="en", token_pattern=_TOKENS, return_ids=False, show_progress=False
    )
    assert isinstance(tokens, list)
    return tokens


def _document(line: bytes, where: str) -> Document:
    try:
        record = json.loads(line)
        text: Any = record["text"]
        document = Document(str(record["id"]), str(record.get("title", "")), text)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorpusError(f'{where}: expected {{"id", "title", "text"}}: {error!r}') from error
    if not isinstance(text, str):
        raise CorpusError(f"{where}: 'text' is not a string")
    return document


def _digest(documents: Iterable[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps([document.id, document.title, document.text]).encode() + b"\n")
    return digest.hexdigest()
