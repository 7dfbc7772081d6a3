"""Which trees of a run are kept for its whole time: few, spread evenly, and the most instructive.

The trees are numbered.  The numbers so far are cut into stretches of equal length, at most ``most`` of them,
and of each the first tree stays, which shows what is usual, and the one whose rewards differ most, which
shows what there was to learn.  A stretch is as long as a power of two, so longer ones are made of shorter
ones: what is thrown away today would not be kept tomorrow, and the sample may be thinned as the run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from system.tree.record import Tree
from system.tree.stats import TreeStats
from system.tree.store import complete_files, file_number, footer, to_table, write_file

_SPREAD = b"espalier.spread"


def kept(spread: Mapping[int, float], most: int) -> set[int]:
    """Numbers of the trees that stay, of those in ``spread`` (number -> standard deviation of the rewards).

    With any ``more``: ``kept({**chosen, **more}, most) == kept({**spread, **more}, most)``, where ``chosen``
    is ``spread`` restricted to ``kept(spread, most)``.  Of equal spreads the earliest tree stays.
    """
    if most < 1 or not spread:
        return set()
    length = 1
    while max(spread) // length >= most:
        length *= 2
    first: dict[int, int] = {}
    best: dict[int, int] = {}
    for number in sorted(spread):
        stretch = number // length
        first.setdefault(stretch, number)
        if spread[number] > spread[best.setdefault(stretch, number)]:
            best[stretch] = number
    return {*first.values(), *best.values()}


class SampleWriter:
    """Keeps that sample in a directory, a file for each tree; the file's metadata say the spread.

    One writer per directory; a new one goes on where the last one stopped.
    """

    def __init__(self, directory: str | Path, most: int) -> None:
        self.directory, self.most = Path(directory), most
        self.directory.mkdir(parents=True, exist_ok=True)
        for partial in self.directory.glob(".trees-*.partial"):  # a killed writer's last breath
            partial.unlink()
        self.spread = {file_number(path): _spread(path) for path in complete_files(self.directory)}

    def wanted(self, spread: Mapping[int, float]) -> set[int]:
        """Numbers of the new trees that stay beside those that are there."""
        return kept({**self.spread, **spread}, self.most) & spread.keys()

    def add(self, number: int, tree: Tree, spread: float) -> None:
        """Write a tree, and delete those that stay no longer."""
        table = to_table([tree], number)
        metadata = {**(table.schema.metadata or {}), _SPREAD: repr(spread).encode()}
        write_file(self.directory, number, table.replace_schema_metadata(metadata))
        self.spread[number] = spread
        for gone in self.spread.keys() - kept(self.spread, self.most):
            (self.directory / f"trees-{gone:09d}.parquet").unlink(missing_ok=True)
            del self.spread[gone]


def spread_of(stats: TreeStats) -> float:
    """The standard deviation of a tree's rewards; 0 without any."""
    return float(stats.rewards.std(dtype=np.float64)) if stats.rewards.size else 0.0


def _spread(path: Path) -> float:
    """A file that is damaged is for nobody to learn from."""
    try:
        return float(footer(path)[1].get(_SPREAD, b"0"))
    except (pa.ArrowInvalid, OSError, ValueError):
        return 0.0
