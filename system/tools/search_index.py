"""A BM25 index over a corpus of short documents (library: bm25s, Lù 2024, arXiv 2407.03618).

Words are found by :func:`tokens` in any script, in documents and queries alike.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import regex
from bm25s.stopwords import STOPWORDS_EN

from system.errors import EspalierError
from system.text import as_text

# Scripts that put no space between words, and Hangul, which puts particles behind them without one.
_UNSPACED = "ー" + "".join(
    rf"\p{{Script={script}}}"
    for script in ("Han", "Hiragana", "Katakana", "Hangul", "Thai", "Lao", "Khmer", "Myanmar")
)
_RUNS = regex.compile(rf"(?V1)(?P<unspaced>[{_UNSPACED}]+)|[\w--[{_UNSPACED}]]+")
_IDEOGRAPH = regex.compile(r"\p{Script=Han}")
_ACCENTS = regex.compile(
    "[\u0300-\u036f]"
)  # of Latin, Greek, Cyrillic; other scripts' marks are letters' own
_STOP_WORDS = frozenset(STOPWORDS_EN)
_SCHEME = "runs-1"  # of tokens: an index kept on disk with another is made again


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


def read_corpus(path: str | Path, most: int = -1) -> list[Document]:
    """Documents of a JSONL file of {"id", "title", "text"}; "title" may be missing.  ``most`` < 0: all."""
    path = Path(path)
    if not path.is_file():
        raise CorpusError(f"no such corpus: {path}")
    documents: list[Document] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if len(documents) == most:
                break
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
        words = [tokens(f"{document.title} {document.text}") for document in documents]
        if not any(words):
            raise CorpusError("the corpus has no document with a word in it")
        scorer = bm25s.BM25(backend="numpy")
        scorer.index(words, show_progress=False)
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
        words = [word for word in tokens(query) if word in known]
        if not words or top_k <= 0:
            return []
        scores = self._scorer.get_scores(words)  # f32[documents]
        top_k = min(top_k, len(scores))
        threshold = np.partition(scores, len(scores) - top_k)[len(scores) - top_k]
        candidates = np.flatnonzero((scores >= threshold) & (scores > 0))  # ascending: the corpus' order
        best = candidates[np.argsort(-scores[candidates], kind="stable")[:top_k]]
        return [Hit(self.documents[i], float(scores[i])) for i in best]


def tokens(text: str) -> list[str]:
    """The words of ``text`` by which it is found, lower-case, without English stop words.

    Compatibility forms are one (NFKC: full-width letters, ligatures), case and accents do not count
    (``Zürich`` is ``zurich``).  A run of a script without spaces between words becomes its pairs of
    neighbours, as in Lucene's CJKAnalyzer, which needs no dictionary, and its ideographs: one of them may be
    a word.
    """
    found: list[str] = []
    for match in _RUNS.finditer(_folded(text)):
        run = match.group()
        if match["unspaced"] and len(run) > 1:
            found += _IDEOGRAPH.findall(run)
            found += (run[i : i + 2] for i in range(len(run) - 1))
        elif run not in _STOP_WORDS:
            found.append(run)
    return found


def _folded(text: str) -> str:
    if text.isascii():
        return text.lower()
    plain = unicodedata.normalize("NFKD", text).casefold()
    return unicodedata.normalize("NFKC", _ACCENTS.sub("", plain))


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
    digest = hashlib.sha256(_SCHEME.encode())
    for document in documents:
        digest.update(json.dumps([document.id, document.title, document.text]).encode() + b"\n")
    return digest.hexdigest()
