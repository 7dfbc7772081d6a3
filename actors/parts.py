"""The parts of the training loop as actors: see ``system/flow/loop.py`` for what it asks of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from actors.engine_monitor import Publisher
from actors.evaluate import CLOSE_MARGIN_S
from actors.in_flight import InFlightCheckpoint
from actors.ray_support import ActorLost, answer, returned
from actors.rollout_pool import RunActors
from system.config import Config
from system.flow.ledger import Ledger, Ticket
from system.flow.loop import TreeLost
from system.flow.replay import TreeInFlight
from system.observe.jsonl import JsonlWriter
from system.observe.progress import Progress
from system.rollout.snapshot import SnapshotError
from system.rollout.tree_rollout import RolloutFailed
from system.tree.prompt import Prompt


class ActorParts:
    """A tree goes from its rollout worker to the object store, and from there to the learner ranks that train
    on it.  What passes through here are tickets, references and statistics.
    """

    def __init__(
        self,
        config: Config,
        actors: RunActors,
        prompts: Mapping[str, Prompt],
        in_flight: InFlightCheckpoint,
        publisher: Publisher,
        ledger: Ledger,
        log: JsonlWriter,
        progress: Progress,
    ) -> None:
        """``log``: where the ledger's events go."""
        self._config, self._actors, self._prompts, self._in_flight = config, actors, prompts, in_flight
        self._publisher, self._ledger, self._log, self._progress = publisher, ledger, log, progress

    async def grow(self, ticket: Ticket, seed: int) -> TreeInFlight[Any]:
        """Grow a tree on its rollout worker.

        One that a checkpoint kept goes on from there, or is there already.  The driver owns the tree in the
        object store (it is a value that an actor returned, not put), so it outlives its worker; it is lost
        only with the machine in whose memory it lies.
        """
        kept = self._in_flight.take(ticket.epoch, ticket.prompt_id)
        if kept is not None and kept.stats is not None:
            return TreeInFlight(ticket, kept.reference, kept.stats)
        workers = self._actors.pool.workers
        name = [*workers][ticket.number % len(workers)]
        worker = workers[name]
        tree, stats = worker.grow.options(num_returns=2).remote(
            self._prompts[ticket.prompt_id], ticket.number, seed, kept and kept.reference
        )
        deadline = self._config.rollout.tree_deadline_s + CLOSE_MARGIN_S
        try:
            told = await answer(stats, deadline, f"{name} growing tree {ticket.number}")
            return TreeInFlight(ticket, tree, told)
        except RolloutFailed as failure:
            raise TreeLost(failure.reason) from failure
        except SnapshotError as failure:
            self._progress.note(f"tree {ticket.number} cannot go on from its snapshot: {failure}")
            raise TreeLost("snapshot") from failure
        except ActorLost as failure:  # keep the place until its worker is back, or it is lost again
            await returned(worker, f"{name}, which grew tree {ticket.number}", lambda: name not in workers)
            raise TreeLost("worker lost") from failure
        except asyncio.CancelledError:
            ray.cancel(stats)
            raise

    async def train(self, version: int, trees: Sequence[TreeInFlight[Any]]) -> Mapping[str, float]:
        return await self._actors.learner.train(version, trees)

    async def publish(self, version: int) -> None:
        """An engine that does not take the weights gets them from the engine monitor."""
        for reason in (await self._publisher.push(version)).values():
            self._progress.note(f"weights {version} not taken yet: {reason}")

    def logged(self) -> None:
        for event in self._ledger.drain():
            self._log.write(event)
