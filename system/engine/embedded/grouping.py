"""Which decoding rows attend together.

Attention over several rows reads as many keys for each of them as the longest has.  Rows are therefore cut
into runs of neighbours, and where the lengths of neighbours differ the rows are moved, keys and all, until
each run holds rows of like length.  All rows grow by one token a step, so an order once made lasts until rows
come and go.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_RUN = 16  # rows that attend together where cutting pays
_CALL_COST = 512  # another kernel call, in keys of one row
_MOVE_COST = 2  # moving one key of one row, in keys attended to: it is read and written, twice


def runs(length: Ints) -> list[tuple[int, int]]:
    """Cut rows of ``length [n]`` tokens into runs ``(first, last)``: into one where more would not pay."""
    n = length.size
    edges = _edges(n)
    if edges.size > 1 and _cut_cost(length, edges) < n * int(length.max()):
        return list(zip(edges.tolist(), [*edges[1:].tolist(), n], strict=True))
    return [(0, n)]


def cost(length: Ints) -> int:
    """Keys that one step reads for rows of ``length [n]``, kernel calls included."""
    whole = length.size * int(length.max())
    edges = _edges(length.size)
    return min(whole, _cut_cost(length, edges)) if edges.size > 1 else whole


def regrouped(length: Ints) -> tuple[Ints, Ints]:
    """(sources, targets): the moves after which runs follow each other in falling length, the fewest there
    are.

    New rows come last and are the shortest as a rule, so falling order needs few moves.
    """
    n = length.size
    edges = _edges(n)
    run = np.searchsorted(edges, np.arange(n), side="right") - 1
    wanted = np.empty(n, np.int64)
    wanted[np.argsort(-length, kind="stable")] = run
    targets = np.flatnonzero(wanted != run)  # as many rows leave a run as come into it
    return targets[np.argsort(wanted[targets], kind="stable")], targets


class Regrouping:
    """Decides when moving rows pays: once waiting has cost as much as the moves.

    That is at most twice the cost of knowing the future (the ski-rental rule, Karlin et al. 1988).
    """

    def __init__(self) -> None:
        self._wasted = 0
        self._seen = np.zeros(0, np.int64)  # the lengths that what follows was computed for
        self._runs: list[tuple[int, int]] = []
        self._waste = 0  # of a step
        self._moves = (self._seen, self._seen)

    def runs(self, length: Ints) -> list[tuple[int, int]]:
        """:func:`runs`, computed anew only where rows have not just grown alike."""
        self._look(length)
        return self._runs

    def due(self, length: Ints) -> tuple[Ints, Ints] | None:
        """Called once a step with the rows' lengths; the moves to make now, if any."""
        self._look(length)
        if self._waste <= 0:
            return None
        self._wasted += self._waste
        if self._wasted < _MOVE_COST * int(length[self._moves[0]].sum()):
            return None
        self._wasted = 0
        return self._moves

    def _look(self, length: Ints) -> None:
        """Where all have grown by the same, runs, waste and moves are as they were."""
        if length.size == self._seen.size and (not length.size or np.ptp(length - self._seen) == 0):
            return
        self._seen, self._runs, self._waste = length.copy(), runs(length), 0
        if length.size >= 2 * _RUN:
            self._waste = cost(length) - cost(np.sort(length)[::-1])
            self._moves = regrouped(length)


def _edges(n: int) -> Ints:
    return np.arange(max(n // _RUN, 1)) * _RUN


def _cut_cost(length: Ints, edges: Ints) -> int:
    rows = np.diff(np.append(edges, length.size))
    return int((np.maximum.reduceat(length, edges) * rows).sum()) + _CALL_COST * (edges.size - 1)
