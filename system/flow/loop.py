"""The order of things in a run: trees start, close, wait, are trained on, and new weights go out.

Decisions are made by the pure objects beside this one (admission, replay queue, ledger); the work is done by
``Parts``: actors in a training run, models on a virtual clock in the digital twin.  Both run this very loop.
It is asyncio without I/O: it waits for its parts and for nothing else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from system.config import Config
from system.errors import EspalierError
from system.flow.admission import may_start
from system.flow.idle import BUSY, IdleClock
from system.flow.ledger import Ledger, Ticket
from system.flow.replay import ReplayQueue, TreeInFlight
from system.tree.stats import TreeStats


class GaveUp(EspalierError):
    """Trees only fail (``flow.give_up_after``): the message says why the last one did."""


class TreeLost(RuntimeError):
    """A tree will not come; the message is a word for counters."""

    def __init__(self, reason: str, text: str = "", *, blameless: bool = False) -> None:
        """``text``: what happened, in a line.  ``blameless``: a machine or a server was lost, and no attempt
        at the prompt has failed.
        """
        super().__init__(reason)
        self.text, self.blameless = text, blameless


class TreesLost(RuntimeError):
    """Closed trees can no longer be had: they were in the memory of a machine that is gone."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        """``reasons`` by index in the batch."""
        super().__init__(f"trees lost before training: {'; '.join(reasons.values())}")
        self.reasons = dict(reasons)


class Parts(Protocol):
    """Where the work is done."""

    async def grow(self, ticket: Ticket, seed: int) -> TreeInFlight:
        """One tree, from its prompt to its close.  Raises :class:`TreeLost`."""
        ...

    async def train(self, version: int, trees: Sequence[TreeInFlight]) -> Mapping[str, float]:
        """One training batch with the weights ``version``; returns the learner's statistics.

        Raises :class:`TreesLost`, and trains on nothing, if some of ``trees`` cannot be had.
        """
        ...

    async def publish(self, version: int) -> None:
        """Send the learner's weights to the engines as ``version``."""
        ...


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A training step whose weights are on the engines."""

    version: int  # of these weights; steps are counted by it
    trees: Sequence[TreeStats]  # what was trained on
    stats: Mapping[str, float]  # the learner's own numbers
    staleness: Sequence[int]  # how many versions each of ``trees`` lagged behind
    pools: Mapping[str, float] = field(default_factory=dict)  # a curriculum's, by share of the questions


class RunEvents(Protocol):
    """Who is told what happened (``system.observe.recorder.Recorder``)."""

    def tree_closed(self, tree: TreeStats, version_now: int) -> None: ...

    def tree_dropped(self, reason: str, leaves: int, text: str = "") -> None: ...

    def idle_total(self, actor: str, cause: str, total_s: float) -> None: ...

    def train_step(self, step: FinishedStep) -> None: ...


class TrainingLoop:
    """Admission, growing and training around one ledger, one replay queue and one learner.

    The owner runs :meth:`admit` as a background task and calls :meth:`step` again and again.
    """

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        parts: Parts,
        events: RunEvents,
        *,
        version: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``version``: what the learner has been trained to (a checkpoint's, on resume)."""
        self.config, self.ledger, self.parts, self.events = config, ledger, parts, events
        self.version = version
        flow = config.flow
        self.replay = ReplayQueue(
            flow.batch_leaves // config.rollout.leaves, flow.window, flow.max_staleness or None
        )
        self.stopping = asyncio.Event()
        self.weights = asyncio.Lock()  # whoever trains or publishes; keeps the ranks' calls in one order
        self._room = asyncio.Event()  # something changed that may let another tree start
        self._arrival = asyncio.Event()  # something changed that may make a batch ready
        self._draining = False
        self._failed = self._silent = 0  # trees since the last training step
        self._gave_up: GaveUp | None = None
        self._idle = IdleClock(clock)

    def stop(self) -> None:
        """Let :meth:`admit` and :meth:`step` return; a training step under way goes on to its end."""
        self.stopping.set()
        self._room.set()
        self._arrival.set()

    def start_no_more(self) -> None:
        """No tree starts from here on, those that grow go on: nothing will be trained on any more."""
        self._draining = True

    # Growing

    async def admit(self) -> None:
        """Start trees whenever one may start, until asked to stop; return when those that grow have ended.

        To cancel it is to cancel them.
        """
        async with asyncio.TaskGroup() as growing:
            while not self.stopping.is_set():
                if self._draining or not may_start(self.ledger, self.config):
                    self._room.clear()
                    with self._idle.during("rollout", "staleness bound"):
                        await self._room.wait()
                    continue
                ticket = self.ledger.next(self.version)
                growing.create_task(self._grow(ticket), name=f"grow-{ticket.number}")

    async def _grow(self, ticket: Ticket) -> None:
        """One tree, from its prompt to the replay queue or back to pending."""
        try:
            with self._idle.during("rollout", BUSY):
                tree = await self.parts.grow(ticket, _seed(self.config.run.seed, ticket.number))
                if not tree.counted and tree.stats.version_max > self.version + 1:  # being published
                    text = f"tokens of weights {tree.stats.version_max}, while {self.version} are trained"
                    raise TreeLost("weight_version", text)
        except TreeLost as lost:
            self._lose([ticket], str(lost), lost.text, blameless=lost.blameless)
            if not lost.blameless:
                self._count_failure(lost)
        else:
            self._take_in(tree)
            if not tree.counted:
                self.events.tree_closed(tree.stats, self.version)
        finally:
            self._room.set()
            self._arrival.set()

    def _take_in(self, tree: TreeInFlight) -> None:
        """Queue a closed tree, or leave it out, if it has nothing to teach and not too many were left out."""
        judged = tree.stats.correct
        rate = float(judged.mean()) if judged.size and self.ledger.wants_rates else None
        if tree.stats.zero_variance and not tree.counted and self._silent < self.config.flow.skip_silent:
            self._silent += 1
            self.ledger.silent(tree.ticket.number, rate)
            self.events.tree_dropped("no signal", self.config.rollout.leaves)
        else:
            self.ledger.queue(tree.ticket.number, rate)
            self.replay.put(tree)

    def _lose(
        self, tickets: Iterable[Ticket], reason: str, text: str = "", *, blameless: bool = False
    ) -> None:
        """Trees that nobody will train on: their prompts are pending again, others may take their places."""
        for ticket in tickets:
            self.ledger.retry(ticket.number, reason, blameless=blameless)
            self.events.tree_dropped(reason, self.config.rollout.leaves, text)
            self._room.set()

    def _count_failure(self, lost: TreeLost) -> None:
        """One more since the last training step; a run that only fails gives up."""
        self._failed += 1
        limit = self.config.flow.give_up_after
        if limit and self._failed >= limit:
            self._gave_up = GaveUp(
                f"{self._failed} trees failed since the last training step (flow.give_up_after={limit}); "
                f"the last one: {lost}: {lost.text}"
            )

    # Learning

    async def step(self) -> Sequence[TreeInFlight] | None:
        """One training step, as soon as there is a batch; returns its trees, or None when asked to stop.

        Trees that are too stale (``flow.max_staleness``), or lost with the machine that held them, go back to
        pending, and the step is made with others.  Raises :class:`GaveUp` when trees only fail.
        """
        while (batch := await self._next_batch()) is not None:
            try:
                await self._train(batch)
            except TreesLost as lost:
                self.replay.put(*(tree for i, tree in enumerate(batch) if i not in lost.reasons))
                for i, text in sorted(lost.reasons.items()):
                    self._lose([batch[i].ticket], "lost after its close", text, blameless=True)
            else:
                return batch
        return None

    async def _next_batch(self) -> list[TreeInFlight] | None:
        with self._idle.during("learner", "no batch"):
            while not self.stopping.is_set():
                self._lose((tree.ticket for tree in self.replay.evict(self.version)), "stale")
                if (batch := self.replay.take(self.ledger.oldest_growing)) is not None:
                    return batch
                if self._gave_up is not None:
                    raise self._gave_up
                self._arrival.clear()
                await self._arrival.wait()  # every tree has a deadline, and sets it at its end
        return None

    async def _train(self, batch: Sequence[TreeInFlight]) -> None:
        """An update and its weights on the engines; only then may trees of the new version start."""
        numbers = [tree.ticket.number for tree in batch]
        trees = [tree.stats for tree in batch]
        version = self.version + 1
        async with self.weights:
            stats = await self.parts.train(self.version, batch)
            self.ledger.train(numbers, version)
            if self.config.flow.update == "drained":
                with self._idle.during("learner", "waiting for trees to close"):
                    await self._drained()
            with self._idle.during("learner", "publishing weights"):
                await self.parts.publish(version)
            lag = [self.version - max(tree.version_min, 0) for tree in trees]
            self.version, self._draining = version, False
            self._failed, self._silent, self._gave_up = 0, 0, None
        self.ledger.trained(numbers)
        self._room.set()
        self._record_idle()
        pools = self.ledger.curriculum.shares() if self.ledger.curriculum else {}
        self.events.train_step(FinishedStep(version, trees, stats, lag, pools))

    async def _drained(self) -> None:
        """Return when no tree grows, or at once when asked to stop.

        No tree starts meanwhile, not even in the place of a lost one: an engine that died gets no weights
        before these are published, so trees that start now could be lost again and again.
        """
        self._draining = True  # until the new weights are out
        while self.ledger.growing and not self.stopping.is_set():
            self._arrival.clear()
            await self._arrival.wait()

    def _record_idle(self) -> None:
        for actor, causes in self._idle.idle().items():
            for cause, seconds in causes.items():
                if cause != BUSY:
                    self.events.idle_total(actor, cause, seconds)


def _seed(run_seed: int, number: int) -> int:
    return int(np.random.SeedSequence((run_seed, number)).generate_state(1)[0])
