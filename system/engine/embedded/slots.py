"""Which tokens each KV slot holds, and which slot holds the longest prefix of a new prompt.

Slots ``0 .. rows`` are the running sequences, kept contiguous so that a decoding step attends over plain
views; the rest keep finished sequences, least recently used first out.  A slot's KV may serve a prompt only
when all of it was computed under the current weights (its *epoch*).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Indices: TypeAlias = NDArray[np.int64] | list[int]
MIXED = -1  # epoch of a slot that is empty, or whose KV belongs to no single set of weights


class SlotTable:
    """Host-side bookkeeping; the tensors are in :class:`~system.engine.embedded.model.KVStore`."""

    def __init__(self, rows: int, cached: int, context: int):
        total = rows + cached
        self.rows = rows
        self.total = total
        self.tokens = np.zeros((total, context), np.int32)
        self.length = np.zeros(total, np.int64)  # tokens whose key and value are valid
        self.epoch = np.full(total, MIXED, np.int64)
        self._used = np.zeros(total, np.int64)
        self._clock = 0
        self.current = 0

    def longest_prefix(self, tokens: NDArray[np.int32], first: int = 0) -> tuple[int, int]:
        """Slot (>= ``first``) with the longest prefix of ``tokens`` under the current weights, and its
        length.
        """
        if not tokens.size:
            return -1, 0
        same = (self.epoch[first:] == self.current) & (self.tokens[first:, 0] == tokens[0])
        usable = same.nonzero()[0] + first
        if not usable.size:
            return -1, 0
        shared = prefix_lengths(self.tokens[usable, : tokens.size], tokens)
        shared = np.minimum(shared, self.length[usable])
        best = int(shared.argmax())
        return int(usable[best]), int(shared[best])

    def touch(self, slot: int) -> None:
        """Mark a slot as used just now."""
        self._clock += 1
        self._used[slot] = self._clock

    def invalidate(self) -> None:
        """New weights: nothing held so far may serve a prompt again."""
        self.current += 1
        self.drop_cached()

    def drop_cached(self) -> None:
        """Forget finished sequences (running ones stay)."""
        self.epoch[self.rows :] = MIXED
        self.length[self.rows :] = 0
        self._used[self.rows :] = 0

    def clear(self) -> None:
        """No slot holds anything."""
        self.epoch[:], self.length[:], self._used[:] = MIXED, 0, 0

    def release(self, row: int) -> None:
        """A running row is gone."""
        self.epoch[row] = MIXED
        self.length[row] = 0

    def move(self, sources: Indices | int, targets: Indices | int) -> None:
        """What slot ``sources[i]`` held, ``targets[i]`` holds."""
        for array in (self.tokens, self.length, self.epoch):
            array[targets] = array[sources]

    def place(self, row: int) -> tuple[int, int]:
        """Cached slot that takes over finished ``row``, and how many of its tokens are there already.

        A slot that holds a prefix of the row is extended; a slot that holds all of it needs nothing more;
        otherwise the least recently used slot is emptied.  (-1, 0) when the row's KV is not worth keeping.
        """
        size = int(self.length[row])
        if self.total == self.rows or self.epoch[row] != self.current or size == 0:
            return -1, 0
        slot, shared = self.longest_prefix(self.tokens[row, :size], self.rows)
        if shared == size or (slot >= 0 and shared == self.length[slot] > 0):
            return slot, shared
        return self.rows + int(self._used[self.rows :].argmin()), 0


def prefix_lengths(table: NDArray[np.int32], tokens: NDArray[np.int32]) -> NDArray[np.int64]:
    """Length of the common prefix of ``tokens [P]`` and each row of ``table [N, <= P]``; P may be 0."""
    if not table.shape[1]:
        return np.zeros(table.shape[0], np.int64)
    differs = table != tokens[: table.shape[1]]
    first = differs.argmax(1)  # 0 also where nothing differs
    return np.where(differs[np.arange(first.size), first], first, table.shape[1])
