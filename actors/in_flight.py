"""Trees in flight across checkpoints: what the workers grow and the queue holds, kept and taken up again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from actors.ray_support import ActorLost, answer
from system.config import Config
from system.flow.ledger import Ledger, State, Ticket
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


def fetch(reference: Any) -> Tree | bytes | None:
    """What is behind a reference; None if it cannot be had: its machine is gone."""
    try:
        return ray.get(reference, timeout=FETCH_DEADLINE_S)
    except RayError:
        return None


class InFlightCheckpoint:
    """Collects the trees in flight for a checkpoint; hands them out again in a resumed run."""

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        workers: Mapping[str, Any],
        recorder: Recorder,
        put: Callable[[Any], Any] = ray.put,
        fetch: Callable[[Any], Tree | bytes | None] = fetch,
    ) -> None:
        """``put``, ``fetch``: into the object store and out of it."""
        self._config, self._ledger, self._workers, self._recorder = config, ledger, workers, recorder
        self._put, self._fetch = put, fetch
        self._kept: dict[tuple[int, str], KeptTree] = {}  # of the checkpoint, not taken up yet

    @property
    def closed(self) -> set[tuple[int, str]]:
        """(epoch, prompt) of the kept trees that had closed."""
        return {key for key, one in self._kept.items() if one.stats is not None}

    async def collect(self, waiting: Iterable[TreeInFlight[Any]]) -> SavedTrees:
        """Every tree in flight, and the recorder's state, as of one moment.

        ``waiting``: the replay queue.  Its trees are fetched one by one while they are written: a checkpoint
        is the one occasion at which this process sees closed trees.
        """
        asked = set(self._ledger.numbers(State.GROWING))
        snapshots: dict[int, bytes] = {}
        calls = (
            answer(worker.snapshots.remote(), SNAPSHOTS_DEADLINE_S, f"snapshots of {name}")
            for name, worker in self._workers.items()
        )
        for found in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(found, dict):
                snapshots |= found
            elif isinstance(found, BaseException) and not isinstance(found, ActorLost):
                raise found
        await self._settle(asked - snapshots.keys())
        growing = [self._ledger.ticket(n) for n in self._ledger.numbers(State.GROWING) if n in snapshots]
        stored = [(*key, one.start_version, one.reference) for key, one in self._kept.items()]
        stored += [(*_key(tree.ticket), tree.ticket.start_version, tree.reference) for tree in waiting]

        def trees() -> Iterator[SavedTree]:
            for one in growing:
                yield SavedTree(*_key(one), one.start_version, snapshots[one.number])
            for epoch, prompt_id, version, reference in stored:
                if (found := self._fetch(reference)) is not None:  # else it is grown anew
                    yield SavedTree(epoch, prompt_id, version, found)

        return SavedTrees(fingerprint(self._config), self._recorder.state(), trees())

    async def _settle(self, missing: set[int]) -> None:
        """A worker that no longer grows a tree has closed it: wait until it is here."""
        loop = asyncio.get_running_loop()
        until = loop.time() + SETTLE_S
        while loop.time() < until and missing & set(self._ledger.numbers(State.GROWING)):  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)

    def restore(self, path: Path, books: Mapping[str, Any]) -> str:
        """Get the trees kept at ``path`` ready; returns what to tell the user.

        The recorder is restored from the state that was kept with them, else from ``books``.  Each tree is
        taken up when the ledger issues its prompt again; what cannot be is counted as dropped.
        """
        try:
            found = in_flight.read(path) if path.exists() else None
        except SavedTreesError as error:
            self._recorder.restore(books)
            return f"the trees in flight are grown anew: {error}"
        self._recorder.restore(found.books if found else books)
        if found is None:
            return "no trees in flight were kept"
        ours, trees = fingerprint(self._config), list(found.trees)
        if different := [key for key in ours if ours[key] != found.fingerprint.get(key)]:
            self._drop(len(trees), "kept under other settings")
            return f"the trees in flight are grown anew: {', '.join(different)} changed"
        for one in trees:
            if self._ledger.resume(one.epoch, one.prompt_id, one.start_version):
                stats = TreeStats.of(one.tree) if isinstance(one.tree, Tree) else None
                kept = KeptTree(one.start_version, self._put(one.tree), stats)
                self._kept[one.epoch, one.prompt_id] = kept
        self._drop(len(trees) - len(self._kept), "kept, but its prompt is not pending")
        closed = len(self.closed)
        return f"{len(self._kept) - closed} trees go on growing, {closed} wait to be trained on"

    def _drop(self, trees: int, reason: str) -> None:
        for _ in range(trees):
            self._recorder.tree_dropped(reason, self._config.rollout.leaves)

    def take(self, epoch: int, prompt_id: str) -> KeptTree | None:
        """What there is of the tree of a prompt that is issued now."""
        return self._kept.pop((epoch, prompt_id), None)


def _key(ticket: Ticket) -> tuple[int, str]:
    return ticket.epoch, ticket.prompt_id
