"""The queue between growing and training: oldest first within a window.  A pure state machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from system.flow.ledger import Ticket
from system.tree.stats import TreeStats


@dataclass(frozen=True, slots=True, eq=False)
class TreeInFlight:
    """A closed tree until it is trained on, as the driver knows it: where the tree is, not what is in it."""

    ticket: Ticket
    reference: Any  # an object reference, say; nobody in ``system.flow`` looks into it
    stats: TreeStats
    counted: bool = False  # it closed before a resume: its close is in the books


class ReplayQueue:
    """Windowed first in, first out over ticket numbers.

    A batch is the oldest closed trees, but none may overtake a tree that still grows by ``window`` batches:
    with b the oldest number that still grows, only numbers below b + window·batch_trees are eligible.  Strict
    order (every batch waits for its slowest tree) and greedy order (which favours short, easy trees) are the
    two ends of ``window``; MiniMax's Forge and NeMo-RL describe the same compromise.

    With :mod:`system.flow.admission`, a tree is trained on at most η + window versions after its start, so
    ``max_staleness`` >= η + window never evicts; a smaller one trades generated tokens for fresher batches.
    """

    def __init__(self, batch_trees: int, window: int, max_staleness: int | None = None) -> None:
        """``max_staleness``: None: nothing is ever evicted."""
        if batch_trees < 1 or window < 1 or (max_staleness or 0) < 0:
            raise ValueError(f"{batch_trees=}, {window=}, {max_staleness=}: out of range")
        self.batch_trees, self.window, self.max_staleness = batch_trees, window, max_staleness
        self._trees: dict[int, TreeInFlight] = {}

    def __len__(self) -> int:
        return len(self._trees)

    def __iter__(self) -> Iterator[TreeInFlight]:
        """The waiting trees, oldest first."""
        return iter([self._trees[number] for number in sorted(self._trees)])

    def put(self, *trees: TreeInFlight) -> None:
        """Trees that have closed, or that were taken and are not trained on after all."""
        self._trees |= {tree.ticket.number: tree for tree in trees}

    def evict(self, version: int) -> list[TreeInFlight]:
        """Remove what is too stale for the update from ``version``, oldest first."""
        limit = self.max_staleness
        stale = [t for t in self if limit is not None and version - t.ticket.start_version > limit]
        for tree in stale:
            del self._trees[tree.ticket.number]
        return stale

    def take(self, oldest_growing: int) -> list[TreeInFlight] | None:
        """A batch, oldest first, or None while none is ready.

        ``oldest_growing``: number of the oldest tree that still grows, or else of the next one.
        """
        numbers = sorted(self._trees)[: self.batch_trees]
        if len(numbers) < self.batch_trees or numbers[-1] >= oldest_growing + self.window * self.batch_trees:
            return None
        return [self._trees.pop(number) for number in numbers]
