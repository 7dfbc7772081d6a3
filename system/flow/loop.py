"""The order of things in a run: trees start, close, wait, are trained on, and new weights go out.

Decisions are made by the pure objects beside this one (admission, replay queue, ledger); the work is done by
``Parts``: actors in a training run, models on a virtual clock in the digital twin.  Both run this very loop.
It is asyncio without I/O: it waits for its parts and for nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from system.config import Config
from system.flow.admission import Admission
from system.flow.idle import BUSY, IdleClock
from system.flow.ledger import Ledger, State, Ticket
from system.flow.replay import Entry, Taken
from system.tree.record import Tree

TAKE_WAIT_S = 5.0  # one long poll of the replay queue

Item = TypeVar("Item")


class TreeLost(RuntimeError):
    """A tree will not come; ``reason`` is a word for counters."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Start:
    """A tree that a resumed run need not begin anew."""

    born: int  # the learner's version when it started
    closed: bool  # it waits for the learner already, and the books know it


@dataclass(slots=True)
class Closed(Generic[Item]):
    """A closed tree until it is trained on."""

    entry: Entry[Item]
    tree: Tree


class Replay(Protocol[Item]):
    """The replay queue, wherever it runs (``system.flow.replay.ReplayQueue`` says what it does)."""

    async def put(self, entry: Entry[Item]) -> None: ...

    async def skip(self, number: int) -> None: ...

    async def take(self, version: int, wait_s: float) -> Taken[Item]: ...


class Parts(Protocol[Item]):
    """Where the work is done."""

    async def grow(self, ticket: Ticket, seed: int) -> tuple[Item, Tree]:
        """One tree, and what the replay queue shall hold of it.  Raises :class:`TreeLost`."""
        ...

    async def train(self, version: int, batch: Sequence[Closed[Item]]) -> Mapping[str, float]:
        """One training batch with the weights ``version``; returns the learner's statistics."""
        ...

    async def publish(self, version: int) -> None:
        """Send the learner's weights to the engines as ``version``."""
        ...

    def logged(self) -> None:
        """The ledger has new events: write them."""
        ...


class RunEvents(Protocol):
    """Who is told what happened (``system.observe.recorder.Recorder``)."""

    def tree_closed(self, tree: Tree, version_now: int) -> None: ...

    def tree_dropped(self, reason: str, leaves: int) -> None: ...

    def idle_total(self, actor: str, cause: str, total_s: float) -> None: ...

    def train_step(
        self,
        step: int,
        version: int,
        trees: Sequence[Tree],
        stats: Mapping[str, float],
        staleness: Sequence[int],
    ) -> None: ...


class TrainingLoop(Generic[Item]):
    """Admission, growing and training around one ledger, one replay queue and one learner.

    The owner runs :meth:`admit` as a background task and calls :meth:`next_batch` and :meth:`train` in turn.
    """

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        parts: Parts[Item],
        replay: Replay[Item],
        books: RunEvents,
        *,
        version: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``version``: what the learner has been trained to (a checkpoint's, on resume)."""
        self.config, self.ledger, self.parts, self.replay, self.books = config, ledger, parts, replay, books
        self.version = version
        flow = config.flow
        self.admission = Admission(
            flow.batch_leaves,
            flow.staleness,
            config.rollout.concurrency,
            accepted=version * flow.batch_leaves,
        )
        self.closed: dict[int, Closed[Item]] = {}
        self.born: dict[int, int] = {}  # trees that grow: number -> version at their start
        self.starts: dict[tuple[int, str], Start] = {}  # (epoch, prompt) -> what a checkpoint has of its tree
        self.stopping = asyncio.Event()
        self.weights = asyncio.Lock()  # whoever trains or publishes; keeps the ranks' calls in one order
        self._room = asyncio.Event()  # something changed that may let another tree start
        self._growing: set[asyncio.Task[None]] = set()
        self._draining = False
        self._idle, self._clock = IdleClock(), clock

    def stop(self) -> None:
        """Let :meth:`admit` and :meth:`next_batch` return; a training step under way goes on to its end."""
        self.stopping.set()
        self._room.set()

    # Growing

    async def admit(self, tasks: asyncio.TaskGroup) -> None:
        """Start trees, as tasks of ``tasks``, whenever one may start, until asked to stop."""
        while not self.stopping.is_set():
            if self._draining or not self.admission.may_start(self.version):
                self._room.clear()
                with self._time("rollout", "staleness bound"):
                    await self._room.wait()
                continue
            ticket = self.ledger.next()
            self.admission.start(self.config.rollout.leaves)
            growing = tasks.create_task(self._grow(ticket), name=f"grow-{ticket.number}")
            self._growing.add(growing)
            growing.add_done_callback(self._growing.discard)

    def cancel_growing(self) -> None:
        for task in self._growing:
            task.cancel()

    async def _grow(self, ticket: Ticket) -> None:
        """One tree, from its prompt to the replay queue or back to pending."""
        leaves, start = self.config.rollout.leaves, self.starts.get((ticket.epoch, ticket.prompt_id))
        born = self.born[ticket.number] = self.version if start is None else start.born
        try:
            with self._time("rollout", BUSY):
                item, tree = await self.parts.grow(ticket, _seed(self.config.run.seed, ticket.number))
        except TreeLost as lost:
            self._lose(ticket.number, lost.reason)
            self.admission.finish(leaves, 0)
            await self.replay.skip(ticket.number)
        else:
            entry = Entry(ticket.number, born, item, leaves)
            self.closed[ticket.number] = Closed(entry, tree)
            self.admission.finish(leaves, tree.n_leaves)
            self.ledger.queue(ticket.number)
            if start is None or not start.closed:
                self.books.tree_closed(tree, self.version)
            await self.replay.put(entry)
        finally:
            del self.born[ticket.number]
            self.starts.pop((ticket.epoch, ticket.prompt_id), None)
            self.parts.logged()
            self._room.set()

    def _lose(self, number: int, reason: str) -> None:
        self.ledger.retry(number, reason)
        self.books.tree_dropped(reason, self.config.rollout.leaves)

    # Learning

    async def next_batch(self) -> list[Closed[Item]] | None:
        """The next training batch, or None when asked to stop.  Evicted trees go back to pending."""
        while not self.stopping.is_set():
            with self._time("learner", "no batch"):
                taken = await self.replay.take(self.version, TAKE_WAIT_S)
            for eviction in taken.evicted:
                number = eviction.entry.number
                del self.closed[number]
                self.admission.evict(eviction.entry.leaves)
                self._lose(number, eviction.reason)
                self._room.set()
            if taken.batch is not None:
                return [self.closed.pop(entry.number) for entry in taken.batch]
        return None

    async def train(self, batch: Sequence[Closed[Item]]) -> None:
        """One training step and its weights on the engines; only then may trees of the new version start."""
        numbers = [one.entry.number for one in batch]
        version = self.version + 1
        self.ledger.train(numbers, version)
        self.parts.logged()
        async with self.weights:
            stats = await self.parts.train(self.version, batch)
            if self.config.flow.update == "drained":
                with self._time("learner", "waiting for trees to close"):
                    await self._drained()
            with self._time("learner", "publishing weights"):
                await self.parts.publish(version)
            lag = [self.version - oldest(one.tree) for one in batch]
            self.version, self._draining = version, False
        self.ledger.trained(numbers)
        self.parts.logged()
        self._room.set()
        self._record_idle()
        self.books.train_step(version, version, [one.tree for one in batch], stats, lag)

    async def _drained(self) -> None:
        """Return when no tree grows, or at once when asked to stop.

        No tree starts meanwhile, not even in the place of a lost one: an engine that died gets no weights
        before these are published, so trees that start now could be lost again and again.
        """
        stopping = asyncio.ensure_future(self.stopping.wait())
        self._draining = True  # until the new weights are out
        try:
            while self._growing and not stopping.done():
                await asyncio.wait({*self._growing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()

    # Accounts

    def holdings(self) -> tuple[int, list[int], list[Entry[Item]]]:
        """For a replay queue that has to be filled again: the oldest open ticket, later ones that are closed
        for good, and the closed trees.
        """
        flight = {*self.ledger.numbers(State.GROWING), *self.ledger.numbers(State.QUEUED)}
        first = min(flight, default=self.ledger.next_number)
        gone = [number for number in range(first, self.ledger.next_number) if number not in flight]
        return first, gone, [closed.entry for closed in self.closed.values()]

    @contextlib.contextmanager
    def _time(self, actor: str, cause: str) -> Generator[None]:
        self._idle.enter(actor, cause, self._clock())
        try:
            yield
        finally:
            self._idle.leave(actor, cause, self._clock())

    def _record_idle(self) -> None:
        for actor, causes in self._idle.idle(self._clock()).items():
            for cause, seconds in causes.items():
                if cause != BUSY:
                    self.books.idle_total(actor, cause, seconds)


def oldest(tree: Tree) -> int:
    """The oldest weight version among a tree's sampled tokens."""
    versions = tree.version[tree.version >= 0]
    return int(versions.min()) if versions.size else 0


def _seed(run_seed: int, number: int) -> int:
    return int(np.random.SeedSequence((run_seed, number)).generate_state(1)[0])
