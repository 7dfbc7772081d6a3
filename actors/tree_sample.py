"""The newest trees that were trained on, kept in the run directory for people to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from actors.ray_support import ActorLost, answer, fetch
from actors.raylet import beside
from system.text import described
from system.tree.store import TreeWriter

WRITE_DEADLINE_S = 600.0  # one batch; a process for it has to start at first


def write_trees(directory: str, keep: int, references: Sequence[Any]) -> list[str]:
    """Append the trees to ``directory``, one after another; those that are lost meanwhile are left out, and
    those that cannot be written: returns why.
    """
    failures: list[str] = []
    try:
        with TreeWriter(directory, keep) as writer:
            for reference in references:
                if (tree := fetch(reference, WRITE_DEADLINE_S)) is None:
                    continue
                try:
                    writer.append(tree)
                except Exception as error:
                    failures.append(described(error))
    except Exception as error:
        failures.append(described(error))
    return failures


class TreeSample:
    """A task of its own on this machine fetches and writes the trees of a batch, while training goes on."""

    def __init__(self, directory: Path, keep: int, failed: Callable[[str, str], object]) -> None:
        """``keep``: the newest trees that stay; -1: all; 0: none.  ``failed`` is told what was not written, a
        kind and a text: no reason to end a run.
        """
        self._directory, self._keep, self._failed = directory.resolve(), keep, failed
        self._writing: Any = None

    async def add(self, references: Sequence[Any]) -> None:
        """Write the trees behind ``references``, oldest first, once those before are written."""
        await self.written()
        wanted = list(references if self._keep < 0 else references[-self._keep :] if self._keep else ())
        if wanted:
            self._writing = beside(write_trees, str(self._directory), self._keep, wanted)

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
