"""The parts of the training loop as actors: see ``system/flow/loop.py`` for what it asks of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from actors.engine_monitor import Publisher, first_ready
from actors.evaluate import CLOSE_MARGIN_S
from actors.in_flight import InFlightCheckpoint
from actors.ray_support import ActorLost, answer, returned
from actors.rollout_pool import RunActors
from system.config import Config
from system.flow.ledger import Ticket
from system.flow.loop import TreeLost
from system.flow.replay import TreeInFlight
from system.observe.progress import Progress
from system.rollout.snapshot import SnapshotError
from system.rollout.tree_rollout import RolloutFailed
from system.tree.prompt import Prompt
from system.tree.record import Outcome

ENGINE_ERROR = Outcome.ENGINE_ERROR.name.lower()


@dataclass(frozen=True, slots=True)
class ActorParts:
    """A tree goes from its rollout worker to the object store, and from there to the learner ranks that train
    on it.  What passes through here are tickets, references and statistics.
    """

    config: Config
    actors: RunActors
    prompts: Mapping[str, Prompt]
    in_flight: InFlightCheckpoint
    publisher: Publisher
    progress: Progress

    async def grow(self, ticket: Ticket, seed: int) -> TreeInFlight:
        """Grow a tree on its rollout worker.

        One that a checkpoint kept goes on from there, or is there already.  The driver owns the tree in the
        object store (it is a value that an actor returned, not put), so it outlives its worker; it is lost
        only with the machine in whose memory it lies.
        """
        kept = self.in_flight.take(ticket.key)
        if kept is not None and kept.stats is not None:
            return TreeInFlight(ticket, kept.reference, kept.stats, counted=True)
        workers = self.actors.pool.workers
        name = [*workers][ticket.number % len(workers)]
        worker = workers[name]
        tree, stats = worker.grow.options(num_returns=2).remote(
            self.prompts[ticket.prompt_id], ticket.number, seed, kept and kept.reference
        )
        deadline = self.config.rollout.tree_deadline_s + CLOSE_MARGIN_S
        try:
            told = await answer(stats, deadline, f"{name} growing tree {ticket.number}")
            return TreeInFlight(ticket, tree, told)
        except RolloutFailed as failure:
            if failure.reason == ENGINE_ERROR:  # keep the place until an engine is there: no try is in vain
                urls = [*self.actors.pool.engines.values()]
                await first_ready(urls, self.config.engine.start_deadline_s)
            raise TreeLost(failure.reason) from failure
        except SnapshotError as failure:
            self.progress.note(f"tree {ticket.number} cannot go on from its snapshot: {failure}")
            raise TreeLost("snapshot") from failure
        except ActorLost as failure:  # keep the place until its worker is back, or it is lost again
            await returned(worker, f"{name}, which grew tree {ticket.number}", lambda: name not in workers)
            raise TreeLost("worker lost") from failure
        except asyncio.CancelledError:
            ray.cancel(stats)
            raise

    async def train(self, version: int, trees: Sequence[TreeInFlight]) -> Mapping[str, float]:
        return await self.actors.learner.train(version, trees)

    async def publish(self, version: int) -> None:
        """An engine that does not take the weights gets them from the engine monitor."""
        for reason in (await self.publisher.push(version)).values():
            self.progress.note(f"weights {version} not taken yet: {reason}")
