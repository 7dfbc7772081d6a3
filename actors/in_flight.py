"""Trees in flight across checkpoints: what the workers grow and the queue holds, kept and taken up again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from actors.ray_support import answer, answers_of_living, fetch
from actors.raylet import beside
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
FETCH_DEADLINE_S = 60.0  # one closed tree, or what one worker grows
WRITE_DEADLINE_S = 600.0  # all of them; a process for it has to start at first
SETTLE_S = 2.0  # for trees that closed while the workers were asked to arrive
LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class KeptTree:
    """A tree of the checkpoint that the run went on from: in the object store, like any other."""

    start_version: int
    reference: Any  # to the tree, or to a snapshot of it
    stats: TreeStats | None  # of a closed tree


@dataclass(frozen=True, slots=True)
class Collected:
    """Every tree in flight as of one moment, by reference: what :func:`write` fetches and writes."""

    fingerprint: dict[str, Any]
    books: dict[str, Any]
    growing: list[tuple[int, Key, int]]  # ticket, epoch and prompt, version at its start
    snapshots: list[Any]  # references to the frozen trees by ticket, one per worker
    stored: list[tuple[Key, int, Any]]  # epoch and prompt, version at its start, reference

    @property
    def empty(self) -> bool:
        """Whether there is no tree."""
        return not self.growing and not self.stored


def write(path: Path, found: Collected, fetch: Callable[[Any, float], Any] = fetch) -> None:
    """Write the trees to ``path``, the stored ones fetched one by one.  One that is lost is left out: it is
    grown anew.
    """
    frozen: dict[int, bytes] = {}
    for reference in found.snapshots:
        frozen |= fetch(reference, FETCH_DEADLINE_S) or {}

    def trees() -> Iterator[SavedTree]:
        for ticket, key, version in found.growing:
            if ticket in frozen:
                yield SavedTree(*key, version, frozen[ticket])
        for key, version, reference in found.stored:
            if (tree := fetch(reference, FETCH_DEADLINE_S)) is not None:
                yield SavedTree(*key, version, tree)

    in_flight.write(path, SavedTrees(found.fingerprint, found.books, trees()))


@dataclass(frozen=True, slots=True)
class InFlightCheckpoint:
    """Collects the trees in flight for a checkpoint; hands them out again in a resumed run."""

    config: Config
    ledger: Ledger
    workers: Mapping[str, Any]
    recorder: Recorder
    put: Callable[[Any], Any] = ray.put  # into the object store
    kept: dict[Key, KeptTree] = field(default_factory=dict)  # of the checkpoint, not taken up yet

    async def collect(self, waiting: Iterable[TreeInFlight]) -> Collected:
        """Every tree in flight, and the recorder's state, as of one moment.

        ``waiting``: the replay queue.
        """
        asked = set(self.ledger.growing)
        tickets: dict[str, Any] = {}
        snapshots: dict[str, Any] = {}
        for name, worker in self.workers.items():
            tickets[name], snapshots[name] = worker.snapshots.remote()
        told = await answers_of_living(tickets, SNAPSHOTS_DEADLINE_S, "snapshots")
        frozen: set[int] = {ticket for one in told.values() for ticket in one}
        await self._settle(asked - frozen)
        growing = [self.ledger.ticket(n) for n in self.ledger.numbers(State.GROWING) if n in frozen]
        stored = [(key, one.start_version, one.reference) for key, one in self.kept.items()]
        stored += [(tree.ticket.key, tree.ticket.start_version, tree.reference) for tree in waiting]
        return Collected(
            fingerprint(self.config),
            self.recorder.state(),
            [(one.number, one.key, one.start_version) for one in growing],
            [snapshots[name] for name in told],
            stored,
        )

    @staticmethod
    async def write(path: Path, found: Collected, *, again: bool) -> None:
        """:func:`write` in another process.  Raises OSError where the disk does not take the trees.

        ``again``: the learner's part of this checkpoint is there.  One that comes with it says all that there
        is to say where there are no trees, as before training: no process is started then.
        """
        if found.empty and not again:
            await asyncio.to_thread(path.unlink, missing_ok=True)
            return
        await answer(beside(write, path, found), WRITE_DEADLINE_S, "writing the trees in flight")

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
