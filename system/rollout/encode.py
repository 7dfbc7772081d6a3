"""Between text and token ids, in one direction per author.

Token in, token out: prompts and tool results are encoded once, when they enter the tree; what the model
sampled is never re-encoded, and decoding only ever makes a view (for parsing a call, for a reward, for a
reader).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from system.tree.record import Int32

Tokenizer = Any
"""A Hugging Face tokenizer.  Used: ``encode``, ``decode``, ``apply_chat_template``, ``chat_template``,
``eos_token_id``."""


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> Int32:
    """Token ids [P] of chat ``messages``, ready for the model's turn.

    With a chat template: the template's own text, generation prompt included.  Without one: the contents in
    order, joined by newlines, with whatever the tokenizer itself puts around a text (a BOS token, say).
    """
    if getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
        )
    else:
        ids = tokenizer.encode("\n".join(message["content"] for message in messages))
    return np.asarray(ids, np.int32)


def encode_text(tokenizer: Tokenizer, text: str, *, trusted: bool = True) -> Int32:
    """Token ids [k] of ``text`` alone, with no special token added.

    ``trusted=False``: special tokens spelled out in the text stay plain text, so that a tool's answer
    cannot end the model's turn or open another.
    """
    if not text:
        return np.empty(0, np.int32)
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not trusted)
    return np.asarray(ids, np.int32)


def decode(tokenizer: Tokenizer, tokens: NDArray[np.integer]) -> str:
    """The text of ``tokens`` [k], special tokens included (tags may be such), end of sequence excepted."""
    ids = tokens[tokens != tokenizer.eos_token_id].tolist()  # asked once: a tokenizer looks it up each time
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
