"""The queue between growing and training: oldest first within a window.  A pure state machine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Entry(Generic[Item]):
    """A closed tree in the queue.  The queue never looks into ``item`` (an object reference, say)."""

    number: int  # ticket number: the order in which trees were started
    version: int  # the learner's version when the tree started
    item: Item
    leaves: int = 0  # leaves it reserved, to give back on eviction


@dataclass(frozen=True, slots=True)
class Eviction(Generic[Item]):
    entry: Entry[Item]
    reason: str


class Taken(NamedTuple, Generic[Item]):
    """``batch`` is None when no batch is ready; ``evicted`` must be accounted for either way."""

    batch: tuple[Entry[Item], ...] | None
    evicted: tuple[Eviction[Item], ...]


class ReplayQueue(Generic[Item]):
    """Windowed first in, first out over ticket numbers.

    Every number from ``first`` on is put exactly once, or skipped (its tree failed).  A batch is the oldest
    closed trees, but none may overtake a tree that still grows by ``window`` batches: with b the oldest
    number neither put nor skipped, only numbers below b + window·batch_trees are eligible.  Strict order
    (every batch waits for its slowest tree) and greedy order (which favours short, easy trees) are the two
    ends of ``window``; MiniMax's Forge and NeMo-RL describe the same compromise.

    With :class:`~system.flow.admission.Admission`, a tree is trained on at most η + window versions after its
    start, so ``max_staleness`` >= η + window never evicts; a smaller one trades generated tokens for fresher
    batches.
    """

    def __init__(self, batch_trees: int, window: int, max_staleness: int, first: int = 0) -> None:
        """``first``: the first ticket number to expect (the ledger's next, on resume)."""
        if batch_trees < 1 or window < 1 or max_staleness < 0:
            raise ValueError(f"{batch_trees=}, {window=}, {max_staleness=}: out of range")
        self.batch_trees, self.window, self.max_staleness = batch_trees, window, max_staleness
        self._entries: dict[int, Entry[Item]] = {}
        self._frontier = first  # every number below it has been put or skipped
        self._arrived: set[int] = set()  # numbers at or above the frontier that have been put or skipped
        self._dropped: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def oldest_growing(self) -> int:
        """The oldest number neither put nor skipped; it may not have been issued yet."""
        return self._frontier

    @property
    def ready(self) -> int:
        """Closed trees that may be taken now."""
        return len(self._eligible())

    @property
    def dropped(self) -> dict[str, int]:
        """Trees evicted so far, by reason."""
        return dict(self._dropped)

    def seen(self, number: int) -> bool:
        """Whether ``number`` has been put or skipped: a caller that may deliver twice asks first."""
        return number < self._frontier or number in self._arrived

    def put(self, entry: Entry[Item]) -> None:
        self._arrive(entry.number)
        self._entries[entry.number] = entry

    def skip(self, number: int) -> None:
        """Number ``number`` will not come: its tree failed.  Nothing waits for it any more."""
        self._arrive(number)

    def take(self, version: int) -> Taken[Item]:
        """Take a batch for the update from ``version``, oldest first; evict what is too stale for it."""
        stale = [e for e in self._entries.values() if version - e.version > self.max_staleness]
        evicted = tuple(self._evict(e, "stale") for e in sorted(stale, key=lambda e: e.number))
        numbers = self._eligible()[: self.batch_trees]
        if len(numbers) < self.batch_trees:
            return Taken(None, evicted)
        return Taken(tuple(self._entries.pop(n) for n in numbers), evicted)

    def drain(self, reason: str) -> tuple[Eviction[Item], ...]:
        """Evict everything (at shutdown), oldest first."""
        return tuple(self._evict(self._entries[n], reason) for n in sorted(self._entries))

    def _eligible(self) -> list[int]:
        limit = self._frontier + self.window * self.batch_trees
        return sorted(n for n in self._entries if n < limit)

    def _evict(self, entry: Entry[Item], reason: str) -> Eviction[Item]:
        del self._entries[entry.number]
        self._dropped[reason] += 1
        return Eviction(entry, reason)

    def _arrive(self, number: int) -> None:
        if self.seen(number):
            raise ValueError(f"tree {number} has already been put or skipped")
        self._arrived.add(number)
        while self._frontier in self._arrived:
            self._arrived.remove(self._frontier)
            self._frontier += 1
