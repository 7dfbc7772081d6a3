"""Where generation ends: EOS, stop token ids, and stop strings matched on bytes without re-tokenising.

Each token's bytes are known beforehand.  For a set of stop strings a table over the vocabulary says which
tokens can complete one of them at all, so a decoding step needs a single table look-up for the whole batch,
and only the rare candidates are compared byte by byte with the tail of what was generated.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from system.models.directory import fast_tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class StopStrings:
    """Matches one set of stop strings against a growing token sequence."""

    def __init__(self, strings: Sequence[str], vocabulary: TokenBytes):
        self._stops = [(text, text.encode()) for text in strings]
        self._reach = max(len(stop) for _, stop in self._stops) - 1
        self._bytes = vocabulary.bytes
        self.completes = np.zeros(len(vocabulary.bytes), bool)  # [V] may this token complete a stop string?
        for _, stop in self._stops:
            for tail in range(1, len(stop) + 1):
                self.completes[vocabulary.starting_with(stop[-tail:])] = True
            self.completes[[i for i, data in enumerate(vocabulary.bytes) if stop in data]] = True

    def match(self, generated: NDArray[np.int32]) -> str | None:
        """The stop string that the last of ``generated`` (>= 1 tokens, no prompt) completed, if any.

        Must have been asked after every earlier token: only matches that end inside the last one are looked
        for.
        """
        last = self._bytes[int(generated[-1])]
        before = b""
        index = len(generated) - 2
        while index >= 0 and len(before) < self._reach:
            before = self._bytes[int(generated[index])] + before
            index -= 1
        for text, stop in self._stops:
            if stop in before[max(0, len(before) - len(stop) + 1) :] + last:
                return text
        return None


class TokenBytes:
    """The bytes that each token id stands for."""

    def __init__(self, data: Sequence[bytes]):
        self.bytes = list(data)
        self._sorted = sorted((token, index) for index, token in enumerate(self.bytes) if token)
        self.stop_strings = lru_cache(maxsize=64)(partial(StopStrings, vocabulary=self))

    def text(self, tokens: Sequence[int]) -> str:
        """Text of a run of tokens; bytes of a character cut at its edge come out as U+FFFD."""
        return b"".join([self.bytes[token] for token in tokens]).decode(errors="replace")

    def starting_with(self, prefix: bytes) -> list[int]:
        """Ids of tokens whose bytes begin with ``prefix``."""
        found = []
        position = bisect_left(self._sorted, (prefix, -1))
        while position < len(self._sorted) and self._sorted[position][0].startswith(prefix):
            found.append(self._sorted[position][1])
            position += 1
        return found

    @classmethod
    def from_directory(cls, path: str | Path, vocab: int) -> TokenBytes | None:
        """Read a Hugging Face tokenizer; None when the directory has none.

        Byte-level BPE, SentencePiece-style BPE with byte fall-back, and plain word or character vocabularies
        are understood.  Ids beyond the tokenizer's own stand for no bytes.
        """
        if not (whole := Path(path) / "tokenizer.json").is_file():
            return None
        tokenizer = fast_tokenizer(whole)
        added = {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items()}
        decoder = str(tokenizer.decoder)
        level = _byte_level_alphabet() if "ByteLevel" in decoder else None
        return cls(
            [
                added[index].encode() if index in added else _piece_bytes(tokenizer.id_to_token(index), level)
                for index in range(vocab)
            ]
        )


def _piece_bytes(piece: str | None, level: dict[str, int] | None) -> bytes:
    if piece is None:
        return b""
    if level is not None and all(character in level for character in piece):
        return bytes(level[character] for character in piece)
    if match := _BYTE_TOKEN.fullmatch(piece):
        return bytes([int(match.group(1), 16)])
    return piece.replace("▁", " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's reversible map from printable characters to bytes (Radford et al. 2019, ``bytes_to_unicode``).

    A byte that is printable in Latin-1 is its own character; the others follow in order from U+0100 on.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    characters = sorted(ByteLevel.alphabet())
    printable = [ord(character) for character in characters if ord(character) < 256]
    others = [byte for byte in range(256) if byte not in printable]
    return dict(zip(characters, [*printable, *others], strict=True))
