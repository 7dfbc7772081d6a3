"""Trees that were trained on, kept in the run directory for people to look at: the newest, and a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ray.exceptions import RayError

from actors.ray_support import ActorLost, answer, fetch
from actors.raylet import beside
from system.flow.replay import TreeInFlight
from system.observe.rundir import RunDir
from system.text import described
from system.tree.sample import SampleWriter, spread_of
from system.tree.store import TreeWriter

WRITE_DEADLINE_S = 600.0  # one batch; a process for it has to start at first


def write_trees(
    directory: str, keep: int, sample: str, stretches: int, trees: Sequence[tuple[Any, float]]
) -> list[str]:
    """Write what is to be kept of ``trees`` (reference, spread of the rewards), oldest first: the newest into
    ``directory``, the sample of the whole run into ``sample`` (``stretches`` 0: none).

    Those that are lost meanwhile are left out, and those that cannot be written: returns why.
    """
    failures: list[str] = []
    try:
        with TreeWriter(directory, keep) as writer:
            over_time = SampleWriter(sample, stretches) if stretches else None
            spread = {writer.number + i: one for i, (_, one) in enumerate(trees)}
            chosen = over_time.wanted(spread) if over_time else set[int]()
            old = len(trees) - keep if keep >= 0 else 0
            for i, (number, (reference, one)) in enumerate(zip(spread, trees, strict=True)):
                newest = i >= old
                tree = fetch(reference, WRITE_DEADLINE_S) if newest or number in chosen else None
                if tree is None or not newest:
                    writer.skip()
                try:
                    if tree is not None and newest:
                        writer.append(tree)
                    if tree is not None and over_time and number in chosen:
                        over_time.add(number, tree, one)
                except Exception as error:
                    failures.append(described(error))
    except Exception as error:
        failures.append(described(error))
    return failures


class TreeSample:
    """A task of its own on this machine fetches and writes the trees of a batch, while training goes on."""

    def __init__(
        self, run_dir: RunDir, keep: int, stretches: int, failed: Callable[[str, str], object]
    ) -> None:
        """``keep``: the newest trees that stay; -1: all; 0: none.  ``stretches`` of the run's time have two
        trees each that stay in any case (:mod:`system.tree.sample`), unless all stay, or none.  ``failed`` is
        told what was not written, a kind and a text: no reason to end a run.
        """
        self._directory, self._sample = run_dir.trees.resolve(), run_dir.tree_sample.resolve()
        self._keep, self._stretches, self._failed = keep, stretches if keep > 0 else 0, failed
        self._writing: Any = None

    async def add(self, trees: Sequence[TreeInFlight]) -> None:
        """Write the ``trees``, oldest first, once those before are written."""
        await self.written()
        if trees and self._keep:
            told = [(tree.reference, spread_of(tree.stats)) for tree in trees]
            where = (str(self._directory), self._keep, str(self._sample), self._stretches)
            self._writing = beside(write_trees, *where, told)

    async def written(self) -> None:
        """Return once everything is on disk."""
        if self._writing is not None:
            try:
                failures = await answer(self._writing, WRITE_DEADLINE_S, "writing trees")
            except (ActorLost, RayError) as error:
                failures = [described(error)]
            self._writing = None
            for text in failures:
                self._failed("trees/", text)
