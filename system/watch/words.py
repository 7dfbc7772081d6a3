"""Tokens as text, one by one, without the weight of transformers where the tokenizer is a file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from system.observe.terminal import visible

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens included."""


def decoder(places: Sequence[Path]) -> Decode | None:
    """Of the first of ``places``, directories in Hugging Face format, with a tokenizer that can be read; None
    without any.
    """
    for place in places:
        with contextlib.suppress(Exception):  # tokenizers raises just that for a file that is half there
            if found := _decoder(place):
                return found
    return None


def _decoder(place: Path) -> Decode | None:
    if (place / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(place / "tokenizer.json"))
        return lambda ids: fast.decode(list(ids), skip_special_tokens=False)
    if (place / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer  # slow, and hundreds of MB

        slow = AutoTokenizer.from_pretrained(place, local_files_only=True)
        return lambda ids: slow.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    return None


def numbered(ids: Sequence[int]) -> str:
    """In place of text, where there is no tokenizer."""
    return "".join(f"⟨{number}⟩" for number in ids)


def token_texts(decode: Decode, ids: Sequence[int]) -> list[str]:
    """[k] the text each token adds, safe to show; a character of several tokens belongs to the last of them.

    Only the tokens since the last whole word but one are decoded again, so that it takes time in proportion.
    """
    texts: list[str] = []
    before, done = 0, 0  # tokens whose text is decoded for its ending's sake, and those that are told
    for end in range(1, len(ids) + 1):
        known, text = decode(ids[before:done]), decode(ids[before:end])
        if text.endswith("\ufffd") and end < len(ids) and end - done < 8:
            texts.append("")
            continue
        new = text[len(known) :] if text.startswith(known) else decode(ids[done:end])
        texts.append(visible(new, breaks=True))
        before, done = done, end
    return texts
