"""Special tokens that contents spell out, kept apart from those that a chat template writes.

A template puts a tool's answer into its text as it is, ``<|im_end|>`` included; whoever turned the whole text
into tokens would let the tool end the model's turn.  So what contents spell is hidden behind a random word
before the template sees it: all special tokens in the template's text are then its own, and the text between
them is encoded as plain text, with the hidden put back.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

from system.rollout.encode import Tokenizer, encode_text
from system.tree.record import Int32


class Specials:
    """The special tokens of a tokenizer, by how they are spelled."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self.ids: dict[str, int] = {str(token): number for number, token in added if token.special}
        spelled = sorted(self.ids, key=len, reverse=True)  # the longest that fits is meant
        self.pattern = re.compile("(" + "|".join(map(re.escape, spelled)) + ")" if spelled else r"(?!)()")
        self._beginnings = {word[:end] for word in spelled for end in range(1, len(word))}
        self._last = {word[-1] for word in self._beginnings}
        self._longest = max(map(len, spelled), default=0)

    def encode(self, text: str, mask: Mask | None = None) -> Int32:
        """Token ids [k] of a template's ``text``: its special tokens as such, all else as plain text, with
        what ``mask`` has hidden put back.
        """
        parts = self.pattern.split(text)
        encoded = [
            np.asarray([self.ids[part]], np.int32)
            if i % 2
            else encode_text(self._tokenizer, mask.restored(part) if mask else part, trusted=False)
            for i, part in enumerate(parts)
        ]
        return np.concatenate(encoded)

    def begun(self, text: str) -> str:
        """The beginning of a special token that ``text``, trailing white space aside, ends with; else ""."""
        stripped = text.rstrip()
        end = stripped[-self._longest :] if stripped[-1:] in self._last else ""
        return next((end[i:] for i in range(len(end)) if end[i:] in self._beginnings), "")


class Mask:
    """Hides what the contents of one rendering spell of special tokens."""

    def __init__(self, specials: Specials) -> None:
        self._specials = specials
        self._word = f"q{secrets.token_hex(10)}n"  # contents cannot guess it
        self._hidden: list[str] = []

    def hide(self, value: Any) -> Any:
        """``value``, JSON, with a word in place of each special token in its strings.

        The beginning of one at the end of a string counts, too: what comes behind it could complete it.
        """
        if isinstance(value, str):
            text = self._specials.pattern.sub(lambda found: self._put(found[0]), value)
            if begun := self._specials.begun(text):
                at = text.rindex(begun)
                text = text[:at] + self._put(begun) + text[at + len(begun) :]
            return text
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(one) for one in value]
        return value

    def damaged(self, text: str) -> bool:
        """Whether something that was hidden stands in a template's ``text`` in other letters, or in part."""
        whole = len(re.findall(self._word + r"\d+z", text))
        return text.casefold().count(self._word[1:9]) > whole

    def restored(self, text: str) -> str:
        """``text`` with everything that was hidden."""
        if not self._hidden:
            return text
        return re.sub(self._word + r"(\d+)z", lambda found: self._hidden[int(found[1])], text)

    def _put(self, spelled: str) -> str:
        self._hidden.append(spelled)
        return f"{self._word}{len(self._hidden) - 1}z"
