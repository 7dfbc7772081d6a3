"""Token ids from the root to a node, in one buffer."""

from __future__ import annotations

import numpy as np

from system.tree.record import Int32


class TokenPath:
    """Token ids from the root onwards in one contiguous buffer that doubles as it fills.

    A branch and the nodes along it share one path, so that its next request costs no copy; only a fork
    copies the prefix, once.  Readers hold views: what has been written never changes, and a buffer outgrown
    is left to them.
    """

    __slots__ = ("buffer", "size")

    def __init__(self, prefix: Int32) -> None:
        self.buffer = np.empty(max(256, 2 * prefix.size), np.int32)
        self.buffer[: prefix.size] = prefix
        self.size = int(prefix.size)

    def append(self, tokens: Int32) -> None:
        size = self.size + tokens.size
        if size > self.buffer.size:
            grown = np.empty(max(size, 2 * self.buffer.size), np.int32)
            grown[: self.size] = self.buffer[: self.size]
            self.buffer = grown
        self.buffer[self.size : size] = tokens
        self.size = int(size)

    def view(self, start: int, stop: int) -> Int32:
        tokens = self.buffer[start:stop]
        tokens.flags.writeable = False
        return tokens
