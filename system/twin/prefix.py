"""The engine model's KV cache: shared prefixes, least recently used first out, in tokens.

What siblings can share ends where they part, at the end of a tool result, so the cache is kept in units of
one model segment with the tool result after it; the first unit is the prompt.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from system.twin.agent import SEGMENT

Unit = Hashable
Path = tuple[tuple[Unit, int], ...]  # from the root: units, and the tokens of each on this path


def path_of(tokens: NDArray[np.int32], prompt: Unit) -> Path:
    """``tokens`` [P], as the synthetic agent and the rollout wrote them, in units."""
    sampled = np.concatenate([[False], tokens >= SEGMENT])
    starts = np.flatnonzero(sampled[1:] & ~sampled[:-1]).tolist()
    bounds = [*starts, tokens.size]
    return ((prompt, bounds[0]), *((int(tokens[a]), b - a) for a, b in pairwise(bounds)))


class PrefixCache:
    """Which units are held, and how much of each.  Pinned units are in use and stay."""

    def __init__(self) -> None:
        self.held = 0  # tokens
        self._tokens: dict[Unit, int] = {}
        self._pins: Counter[Unit] = Counter()
        self._free: OrderedDict[Unit, None] = OrderedDict()  # unpinned, least recently used first

    def match(self, path: Path) -> int:
        """Leading tokens of ``path`` that are held; the last token is never served from the cache."""
        found = total = 0
        for unit, tokens in path:
            total += tokens
            if found < total - tokens:
                continue
            found += min(self._tokens.get(unit, 0), tokens)
        return min(found, total - 1)

    def pin(self, path: Path) -> int:
        """Hold all of ``path`` until :meth:`unpin`; returns the tokens that it adds to what is held."""
        before = self.held
        for unit, tokens in path:
            have = self._tokens.get(unit, 0)
            if tokens > have:
                self._tokens[unit] = tokens
                self.held += tokens - have
            self._pins[unit] += 1
            self._free.pop(unit, None)
        return self.held - before

    def unpin(self, path: Path) -> None:
        """Children first, so that they are forgotten before their ancestors."""
        for unit, _ in reversed(path):
            self._pins[unit] -= 1
            if self._pins[unit] == 0:
                del self._pins[unit]
                if unit in self._tokens:
                    self._free[unit] = None

    def keep(self, unit: Unit, tokens: int) -> None:
        """A finished segment stays until the room is needed."""
        self.held += tokens - self._tokens.get(unit, 0)
        self._tokens[unit] = tokens
        if unit not in self._pins:
            self._free[unit] = None

    def evict(self, tokens: int) -> None:
        """Forget unpinned units until at least ``tokens`` are free, or none is left."""
        while tokens > 0 and self._free:
            unit, _ = self._free.popitem(last=False)
            freed = self._tokens.pop(unit)
            self.held -= freed
            tokens -= freed
