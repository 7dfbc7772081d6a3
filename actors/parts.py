"""The parts of the training loop as actors: see ``system/flow/loop.py`` for what it asks of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.exceptions import RayError, RayTaskError

from actors.engine_monitor import EngineOutage, Publisher
from actors.evaluate import tree_answer_s
from actors.in_flight import InFlightCheckpoint
from actors.ray_support import ActorLost, answer, returned
from actors.rollout_pool import RunActors
from system.config import Config, at_step
from system.flow.ledger import Ticket
from system.flow.loop import GaveUp, TreeLost
from system.flow.replay import TreeInFlight
from system.observe.progress import Progress
from system.rollout.failure import RolloutFailed
from system.rollout.snapshot import SnapshotError
from system.text import described
from system.tree.prompt import Prompt


class Deaths:
    """How often each rollout worker has died since the last training step.

    The trees of a worker that dies are grown again, and no prompt is blamed: most of them were only beside
    what killed it.  But what kills it every time must end the run.
    """

    def __init__(self, limit: int) -> None:
        """``limit``: of one worker; 0: none."""
        self._limit, self._count = limit, Counter[str]()
        self._down: set[str] = set()

    def trained(self) -> None:
        self._count.clear()

    def died(self, worker: str, cause: str) -> None:
        """Told by every tree that ``worker`` grew.  Raises GaveUp beyond the limit."""
        if worker in self._down:
            return
        self._down.add(worker)
        self._count[worker] += 1
        if 0 < self._limit < self._count[worker]:
            raise GaveUp(
                f"{worker} has died {self._count[worker]} times since the last training step "
                f"(cluster.worker_restarts={self._limit}); the last time: {cause}; see logs/{worker}.log"
            )

    def back(self, worker: str) -> None:
        self._down.discard(worker)


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
    outage: EngineOutage
    deaths: Deaths

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
        prompt, start = self.prompts[ticket.prompt_id], kept and kept.reference
        temperature = at_step(self.config, ticket.start_version).rollout.temperature
        tree, stats = worker.grow.options(num_returns=2).remote(
            prompt, ticket.number, seed, temperature, start, ticket.guide
        )
        deadline = tree_answer_s(self.config)
        try:
            told = await answer(stats, deadline, f"{name} growing tree {ticket.number}")
            self.outage.over()
            return TreeInFlight(ticket, tree, told)
        except RolloutFailed as failure:
            if failure.blameless:  # keep the place until an engine is back
                await self.outage.wait(failure.detail)
            raise TreeLost(failure.reason, str(failure), blameless=failure.blameless) from failure
        except SnapshotError as failure:
            text = f"tree {ticket.number} cannot go on from its snapshot: {failure}"
            raise TreeLost("snapshot", text, blameless=True) from failure
        except (RayTaskError, OSError, UnicodeError) as failure:  # its answer could not be stored, or be read
            cause = failure.cause if isinstance(failure, RayTaskError) else failure
            raise TreeLost("answer", described(cause)) from failure
        except (ActorLost, RayError) as failure:  # keep the place until its worker is back, or lost again
            self.deaths.died(name, str(failure))
            what, back_s = f"{name}, which grew tree {ticket.number}", self.config.cluster.start_deadline_s
            await returned(worker, back_s, what, lambda: name not in workers)
            self.deaths.back(name)
            raise TreeLost("worker lost", str(failure), blameless=True) from failure
        except asyncio.CancelledError:
            ray.cancel(stats)
            raise

    async def train(self, version: int, trees: Sequence[TreeInFlight]) -> Mapping[str, float]:
        trained = await self.actors.learner.train(version, trees)
        self.deaths.trained()
        return trained

    async def publish(self, version: int) -> None:
        """An engine that does not take the weights gets them from the engine monitor."""
        for reason in (await self.publisher.push(version)).values():
            self.progress.note(f"weights {version} not taken yet: {reason}")
