"""Trees in flight across checkpoints: what the workers grow and the queue holds, kept and taken up again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from actors.ray_support import answers_of_living, fetch
from system.config import Config
from system.flow.ledger import Key, Ledger, State
from system.flow.replay import TreeInFlight
from system.observe.recorder import Recorder
from system.rollout import in_flight
from system.rollout.in_flight import SavedTree, SavedTrees, SavedTreesError
from system.rollout.snapshot import fingerprint
from system.tree.record import Tree
from system.tree.stats import TreeStats

SNAPSHOTS_DEADLINE_S = 60.0
FETCH_DEADLINE_S = 60.0  # one closed tree
SETTLE_S = 2.0  # for trees that closed while the workers were asked to arrive
LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class KeptTree:
    """A tree of the checkpoint that the run went on from: in the object store, like any other."""

    start_version: int
    reference: Any  # to the tree, or to a snapshot of it
    stats: TreeStats | None  # of a closed tree


@dataclass(frozen=True, slots=True)
class InFlightCheckpoint:
    """Collects the trees in flight for a checkpoint; hands them out again in a resumed run."""

    config: Config
    ledger: Ledger
    workers: Mapping[str, Any]
    recorder: Recorder
    put: Callable[[Any], Any] = ray.put  # into the object store
    fetch: Callable[[Any, float], Any] = fetch  # out of it
    kept: dict[Key, KeptTree] = field(default_factory=dict)  # of the checkpoint, not taken up yet

    async def collect(self, waiting: Iterable[TreeInFlight]) -> SavedTrees:
        """Every tree in flight, and the recorder's state, as of one moment.

        ``waiting``: the replay queue.  Its trees are fetched one by one while they are written: a checkpoint
        is the one occasion at which this process sees closed trees.
        """
        asked = set(self.ledger.growing)
        calls = {name: worker.snapshots.remote() for name, worker in self.workers.items()}
        found = await answers_of_living(calls, SNAPSHOTS_DEADLINE_S, "snapshots")
        snapshots: dict[int, bytes] = {number: data for one in found.values() for number, data in one.items()}
        await self._settle(asked - snapshots.keys())
        growing = [self.ledger.ticket(n) for n in self.ledger.numbers(State.GROWING) if n in snapshots]
        stored = [(*key, one.start_version, one.reference) for key, one in self.kept.items()]
        stored += [(*tree.ticket.key, tree.ticket.start_version, tree.reference) for tree in waiting]

        def trees() -> Iterator[SavedTree]:
            for one in growing:
                yield SavedTree(*one.key, one.start_version, snapshots[one.number])
            for epoch, prompt_id, version, reference in stored:
                if (found := self.fetch(reference, FETCH_DEADLINE_S)) is not None:  # else it is grown anew
                    yield SavedTree(epoch, prompt_id, version, found)

        return SavedTrees(fingerprint(self.config), self.recorder.state(), trees())

    async def _settle(self, missing: set[int]) -> None:
        """A worker that no longer grows a tree has closed it: wait until it is here."""
        loop = asyncio.get_running_loop()
        until = loop.time() + SETTLE_S
        while loop.time() < until and missing & self.ledger.growing:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)

    def restore(self, path: Path, books: Mapping[str, Any]) -> str:
        """Get the trees kept at ``path`` ready; returns what to tell the user.

        The recorder is restored from the state that was kept with them, else from ``books``.  Each tree is
        taken up when the ledger issues its prompt again; what cannot be is counted as dropped.
        """
        try:
            found = in_flight.read(path) if path.exists() else None
        except SavedTreesError as error:
            self.recorder.restore(books)
            return f"the trees in flight are grown anew: {error}"
        self.recorder.restore(found.books if found else books)
        if found is None:
            return "no trees in flight were kept"
        ours, trees = fingerprint(self.config), list(found.trees)
        if different := [key for key in ours if ours[key] != found.fingerprint.get(key)]:
            self._drop(len(trees), "kept under other settings")
            return f"the trees in flight are grown anew: {', '.join(different)} changed"
        for one in trees:
            key = one.epoch, one.prompt_id
            if self.ledger.resume(key, one.start_version):
                stats = TreeStats.of(one.tree) if isinstance(one.tree, Tree) else None
                self.kept[key] = KeptTree(one.start_version, self.put(one.tree), stats)
        self._drop(len(trees) - len(self.kept), "kept, but its prompt is not pending")
        closed = sum(one.stats is not None for one in self.kept.values())
        return f"{len(self.kept) - closed} trees go on growing, {closed} wait to be trained on"

    def _drop(self, trees: int, reason: str) -> None:
        for _ in range(trees):
            self.recorder.tree_dropped(reason, self.config.rollout.leaves)

    def take(self, key: Key) -> KeptTree | None:
        """What there is of the tree of a prompt that is issued now."""
        return self.kept.pop(key, None)
