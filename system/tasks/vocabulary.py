"""Does a model's tokenizer know the text it is to read?  What it does not know, it reads as one and the same
unknown token: nothing could be learned from that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from system.models.directory import fast_tokenizer
from system.tree.prompt import Prompt

QUESTIONS = 32  # the first ones, that are looked at
MOST = 0.1  # share of unknown tokens with which training is refused


@dataclass(frozen=True, slots=True)
class UnknownTokens:
    """Those of the first questions and their gold answers."""

    count: int
    of: int  # tokens looked at
    example: str  # a text that is unknown

    @property
    def too_many(self) -> bool:
        return self.count > MOST * self.of

    def __str__(self) -> str:
        return (
            f"{self.count} of the first {self.of} tokens of questions and answers are unknown to the model's "
            f"tokenizer, {self.example!r} for one"
        )


def unknown_tokens(model: str, prompts: Sequence[Prompt]) -> UnknownTokens | None:
    """What the tokenizer of the model in directory ``model`` does not know of the first ``prompts``.

    None: nothing, or there is no ``tokenizer.json`` that could tell.  Needs no transformers.
    """
    file = Path(model) / "tokenizer.json"
    if not model or not file.is_file():
        return None
    try:
        tokenizer = fast_tokenizer(file)
    except ValueError:  # preflight tells of it
        return None
    unknown = _unknown_id(json.loads(file.read_bytes())["model"], tokenizer)
    found: list[str] = []
    tokens = 0
    for prompt in prompts[:QUESTIONS]:
        for text in (*(message["content"] for message in prompt.messages), *prompt.answers):
            encoded: Any = tokenizer.encode(text, add_special_tokens=False)
            tokens += len(encoded.ids)
            pairs = zip(encoded.ids, encoded.offsets, strict=True)
            found += [text[start:end] for token, (start, end) in pairs if token == unknown]
    return UnknownTokens(len(found), tokens, found[0]) if found else None


def _unknown_id(model: dict[str, Any], tokenizer: Any) -> int | None:
    """The id of the token for what is unknown; None: the tokenizer knows every text (bytes)."""
    if isinstance(index := model.get("unk_id"), int):  # Unigram
        return index
    return tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else None
