"""Trees in flight across checkpoints: what the workers grow and the queue holds, kept and taken up again."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.ray_support import ActorLost, answer
from system.config import Config
from system.flow.ledger import Ledger, State
from system.flow.loop import Start, TrainingLoop
from system.observe.recorder import Recorder
from system.rollout import in_flight
from system.rollout.in_flight import SavedTree, SavedTrees, SavedTreesError
from system.rollout.snapshot import fingerprint

SNAPSHOTS_DEADLINE_S = 60.0
SETTLE_S = 2.0  # for trees that closed while the workers were asked to arrive
LOOK_S = 0.02


class InFlightCheckpoint:
    """Collects the trees in flight for a checkpoint; hands them out again in a resumed run."""

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        loop: TrainingLoop[Any],
        workers: Sequence[Any],
        recorder: Recorder,
    ) -> None:
        self._config, self._ledger, self._loop = config, ledger, loop
        self._workers, self._recorder = workers, recorder
        self._waiting: dict[tuple[int, str], SavedTree] = {}  # of the checkpoint, not taken up yet

    async def collect(self) -> SavedTrees:
        """Every tree in flight, and the recorder's state, as of one moment."""
        asked = set(self._ledger.numbers(State.GROWING))
        snapshots: dict[int, bytes] = {}
        calls = (
            answer(worker.snapshots.remote(), SNAPSHOTS_DEADLINE_S, f"snapshots of rollout worker {number}")
            for number, worker in enumerate(self._workers)
        )
        for found in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(found, dict):
                snapshots |= found
            elif isinstance(found, BaseException) and not isinstance(found, ActorLost):
                raise found
        await self._settle(asked - snapshots.keys())
        trees = list(self._waiting.values())
        growing = self._ledger.numbers(State.GROWING)
        trees += [self._kept(n, self._loop.born[n], snapshots[n]) for n in growing if n in snapshots]
        trees += [self._kept(n, one.entry.version, one.tree) for n, one in self._loop.closed.items()]
        return SavedTrees(fingerprint(self._config), self._recorder.state(), tuple(trees))

    async def _settle(self, missing: set[int]) -> None:
        """A worker that no longer grows a tree has closed it: wait until it is here."""
        loop = asyncio.get_running_loop()
        until = loop.time() + SETTLE_S
        while loop.time() < until and missing & set(self._ledger.numbers(State.GROWING)):  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)

    def _kept(self, number: int, born: int, tree: Any) -> SavedTree:
        ticket = self._ledger.ticket(number)
        return SavedTree(ticket.epoch, ticket.prompt_id, born, tree)

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
        ours = fingerprint(self._config)
        if different := [key for key in ours if ours[key] != found.fingerprint.get(key)]:
            self._drop(len(found.trees), "kept under other settings")
            return f"the trees in flight are grown anew: {', '.join(different)} changed"
        pending = {
            (one.epoch, one.prompt_id): one
            for one in found.trees
            if self._ledger.state(one.epoch, one.prompt_id) == State.PENDING
        }
        self._drop(len(found.trees) - len(pending), "kept, but its prompt is not pending")
        self._waiting = pending
        self._loop.starts |= {key: Start(one.born, one.closed) for key, one in pending.items()}
        closed = sum(one.closed for one in pending.values())
        return f"{len(pending) - closed} trees go on growing, {closed} wait to be trained on"

    def _drop(self, trees: int, reason: str) -> None:
        for _ in range(trees):
            self._recorder.tree_dropped(reason, self._config.rollout.leaves)

    def take(self, epoch: int, prompt_id: str) -> SavedTree | None:
        """What there is of the tree of a prompt that is issued now."""
        return self._waiting.pop((epoch, prompt_id), None)
