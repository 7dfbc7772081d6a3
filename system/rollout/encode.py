"""Between text and token ids, in one direction per author.

Token in, token out: prompts (:mod:`system.rollout.chat`) and tool results are encoded once, when they enter
the tree; what the model sampled is never re-encoded, and decoding only ever makes a view (for parsing a call,
for a reward, for a reader).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from system.config import ConfigError
from system.tree.record import Int32

Tokenizer = Any
"""A Hugging Face tokenizer.  Used: ``encode``, ``decode``, ``apply_chat_template``, ``chat_template``,
``eos_token_id``, ``added_tokens_decoder``."""

OPENING_TOKENS = 64  # more than what a chat template opens, even where every byte is a token
_OPENED = re.compile(r"<(think|thinking|thought|reasoning)>\s*(?:</\1>\s*)?\Z")


def local_tokenizer(path: str) -> Tokenizer:
    """The one in the directory ``path``, for one text at a time.  Raises :class:`ConfigError` for none that
    can be read."""
    # Waking the tokenizer's thread pool for one text takes as long as encoding it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer  # slow import

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: no tokenizer can be read there: {error}; let model.path name a whole model"
        ) from error


def encode_text(tokenizer: Tokenizer, text: str, *, trusted: bool = True) -> Int32:
    """Token ids [k] of ``text`` alone, with no special token added.

    ``trusted=False``: special tokens spelled out in the text stay plain text, so that a tool's answer
    cannot end the model's turn or open another.
    """
    if not text:
        return np.empty(0, np.int32)
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not trusted)
    return np.asarray(ids, np.int32)


def fitted(tokenizer: Tokenizer, text: str, most: int) -> str:
    """The beginning of ``text`` that makes ``most`` tokens or fewer, all of it if it can be."""
    ids = encode_text(tokenizer, text, trusted=False)
    if ids.size <= most:
        return text
    cut = tokenizer.decode(ids[: max(0, most)].tolist(), clean_up_tokenization_spaces=False)
    return cut.rstrip("\ufffd")  # half a letter


def decode(tokenizer: Tokenizer, tokens: NDArray[np.integer], ends: Iterable[int]) -> str:
    """The text of ``tokens`` [k], special tokens included (tags may be such), those that end a turn
    excepted."""
    left_out = frozenset(ends)
    kept = [token for token in tokens.tolist() if token not in left_out]
    if not kept:
        return ""
    if _only_wraps(type(tokenizer)):
        return tokenizer.backend_tokenizer.decode(kept, skip_special_tokens=False)
    return tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@cache
def _only_wraps(kind: type) -> bool:
    """Whether a tokenizer of this class decodes as the one of the ``tokenizers`` library that it wraps, only
    slower: it looks at the type of every token.
    """
    from transformers import PreTrainedTokenizerFast as Wrapper  # slow import

    names = ("decode", "_decode")
    return issubclass(kind, Wrapper) and all(getattr(kind, name) is getattr(Wrapper, name) for name in names)


def opening(text: str) -> str:
    """What ``text`` ends with that belongs to the model's turn already: ``<think>`` and a line break, say, or
    an empty thought where thinking is switched off; empty for nothing.
    """
    found = _OPENED.search(text)
    return found[0] if found else ""
