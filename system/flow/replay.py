"""The queue between growing and training: oldest first within a window.  A pure state machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from system.flow.ledger import Ticket
from system.tree.stats import TreeStats

Reference = TypeVar("Reference")


@dataclass(frozen=True, slots=True, eq=False)
class TreeInFlight(Generic[Reference]):
    """A closed tree until it is trained on, as the driver knows it: where the tree is, not what is in it."""

    ticket: Ticket
    reference: Reference  # an object reference, say; nobody in ``system.flow`` looks into it
    stats: TreeStats


class ReplayQueue(Generic[Reference]):
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

    def __init__(
        self, batch_trees: int, window: int, max_staleness: int | None = None, first: int = 0
    ) -> None:
        """``max_staleness``: None: nothing is ever evicted.  ``first``: the first ticket number to expect
        (the ledger's next, on resume).
        """
        if batch_trees < 1 or window < 1 or (max_staleness or 0) < 0:
            raise ValueError(f"{batch_trees=}, {window=}, {max_staleness=}: out of range")
        self.batch_trees, self.window, self.max_staleness = batch_trees, window, max_staleness
        self.oldest_growing = first  # every number below it has been put or skipped; it may not be issued yet
        self._trees: dict[int, TreeInFlight[Reference]] = {}
        self._arrived: set[int] = set()  # numbers from the oldest growing on that have been put or skipped

    def __len__(self) -> int:
        return len(self._trees)

    def __iter__(self) -> Iterator[TreeInFlight[Reference]]:
        """The waiting trees, oldest first."""
        return iter([self._trees[number] for number in sorted(self._trees)])

    @property
    def ready(self) -> int:
        """Trees that may be taken now."""
        limit = self.oldest_growing + self.window * self.batch_trees
        return sum(number < limit for number in self._trees)

    def put(self, tree: TreeInFlight[Reference]) -> None:
        self._arrive(tree.ticket.number)
        self._trees[tree.ticket.number] = tree

    def skip(self, number: int) -> None:
        """Number ``number`` will not come: its tree failed.  Nothing waits for it any more."""
        self._arrive(number)

    def put_back(self, trees: Iterable[TreeInFlight[Reference]]) -> None:
        """Undo a ``take`` for these trees."""
        self._trees |= {tree.ticket.number: tree for tree in trees}

    def evict(self, version: int) -> list[TreeInFlight[Reference]]:
        """Remove what is too stale for the update from ``version``, oldest first."""
        limit = self.max_staleness
        stale = [t for t in self if limit is not None and version - t.ticket.start_version > limit]
        for tree in stale:
            del self._trees[tree.ticket.number]
        return stale

    def take(self) -> list[TreeInFlight[Reference]] | None:
        """A batch, oldest first, or None while none is ready."""
        if self.ready < self.batch_trees:
            return None
        numbers = sorted(self._trees)[: self.batch_trees]
        return [self._trees.pop(number) for number in numbers]

    def _arrive(self, number: int) -> None:
        if number < self.oldest_growing or number in self._arrived:
            raise ValueError(f"tree {number} has already been put or skipped")
        self._arrived.add(number)
        while self.oldest_growing in self._arrived:
            self._arrived.remove(self.oldest_growing)
            self.oldest_growing += 1
