"""The conductor: one asyncio loop that hands out prompts, feeds the learner and carries new weights to the
engines.

Decisions are made by the pure objects in ``system/flow``; work is done by the actors.  What stands here is
the order of things.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.crew import Crew
from actors.evaluation import CLOSE_MARGIN_S, evaluate
from actors.fleet import Fleet
from actors.learner import LEARNER_DEADLINE_S
from actors.replay import ReplayHandle
from actors.supervise import ActorLost, answer, returned
from system.config import Config
from system.flow.admission import Admission
from system.flow.idle import BUSY, IdleClock
from system.flow.ledger import Ledger, State, Ticket
from system.flow.replay import Entry
from system.learn.schedule import warm_start_lr
from system.observe.eval import EvalResult
from system.observe.jsonl import JsonlWriter
from system.observe.progress import TRAINING, Progress
from system.observe.recorder import GROWING, QUEUE_DEPTH, Recorder, Which
from system.observe.rundir import RunDir
from system.rollout.grower import GrowthFailed
from system.tasks.base import Prompt
from system.tree.record import Tree
from system.tree.store import TreeWriter

TAKE_WAIT_S = 5.0  # one long poll of the replay queue
GAUGE_S = 1.0  # between readings of the gauges
CHECKPOINT = re.compile(r"v\d{6}")


@dataclass(slots=True)
class Closed:
    """A closed tree until it is trained on."""

    entry: Entry[Any]
    tree: Tree


class Conductor:
    """Runs training from ``version`` (0, or a checkpoint's) to ``config.run.steps``."""

    def __init__(
        self,
        config: Config,
        crew: Crew,
        prompts: Mapping[str, Prompt],
        questions: Sequence[Prompt],
        ledger: Ledger,
        recorder: Recorder,
        run_dir: RunDir,
        progress: Progress,
        version: int = 0,
    ) -> None:
        self.config, self.crew, self.recorder, self.run_dir = config, crew, recorder, run_dir
        self.prompts, self.questions, self.ledger, self.progress = prompts, questions, ledger, progress
        self.version = version
        flow, rollout = config.flow, config.rollout
        self.admission = Admission(
            flow.batch_leaves, flow.staleness, rollout.concurrency, accepted=version * flow.batch_leaves
        )
        self.closed: dict[int, Closed] = {}
        self.replay = ReplayHandle(crew.replay, self)
        self.fleet = Fleet(crew.growers.engines, self, recorder)
        self.stopping = asyncio.Event()
        self._room = asyncio.Event()  # something changed that may let another tree start
        self._idle = IdleClock()
        self._growing: set[asyncio.Task[None]] = set()
        self.weights = asyncio.Lock()  # whoever trains or publishes; keeps the ranks' calls in one order
        self._log = JsonlWriter(run_dir.ledger_path)
        self._trees = TreeWriter(run_dir.trees, keep=config.observe.trees)

    async def run(self) -> bool:
        """Train.  True at its end, False when it was asked to stop first (a checkpoint is saved).

        The end is ``run.steps``, or earlier by ``run.stop_at_accuracy``.
        """
        self.progress.phase(TRAINING)
        await self.replay.fill()
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(self._admit(tasks), name="admission"),
                tasks.create_task(self.fleet.watch(), name="engine watch"),
                tasks.create_task(self._read_gauges(), name="gauges"),
            ]
            try:
                await self._learn()
                finished = not self.stopping.is_set() or self.version >= self.config.run.steps
            finally:
                self.stopping.set()
                for task in (*background, *self._growing):
                    task.cancel()
        self._trees.close()
        self._write_ledger()
        return finished

    def stop(self) -> None:
        """Finish the training step under way, save, and return from ``run``."""
        self.stopping.set()
        self._room.set()

    # Growing

    async def _admit(self, tasks: asyncio.TaskGroup) -> None:
        while not self.stopping.is_set():
            if not self.admission.may_start(self.version):
                self._room.clear()
                with self._time("rollout", "staleness bound"):
                    await self._room.wait()
                continue
            ticket = self.ledger.next()
            self.admission.start(self.config.rollout.leaves)
            growing = tasks.create_task(self._grow(ticket), name=f"grow-{ticket.number}")
            self._growing.add(growing)
            growing.add_done_callback(self._growing.discard)

    async def _grow(self, ticket: Ticket) -> None:
        """One tree, from its prompt to the replay queue or back to pending."""
        born = self.version
        worker = self.crew.growers.workers[ticket.number % len(self.crew.growers.workers)]
        seed = _seed(self.config.run.seed, ticket.number)
        reference = worker.grow.remote(self.prompts[ticket.prompt_id], ticket.number, seed)
        leaves = self.config.rollout.leaves
        try:
            with self._time("rollout", BUSY):
                tree: Tree = await answer(
                    reference,
                    self.config.rollout.tree_deadline_s + CLOSE_MARGIN_S,
                    f"rollout worker growing tree {ticket.number}",
                )
        except (GrowthFailed, ActorLost) as failure:
            if isinstance(failure, ActorLost):  # keep the place until its worker is back, or it is lost again
                await returned(worker, f"rollout worker of tree {ticket.number}")
            self._lose(ticket.number, _reason(failure))
            self.admission.finish(leaves, 0)
            await self.replay.skip(ticket.number)
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise
        else:
            entry = Entry(ticket.number, born, [reference], leaves)
            self.closed[ticket.number] = Closed(entry, tree)
            self.admission.finish(leaves, tree.n_leaves)
            self.ledger.queue(ticket.number)
            self.recorder.tree_closed(tree, self.version)
            await self.replay.put(entry)
        finally:
            self._write_ledger()
            self._room.set()

    def _lose(self, number: int, reason: str) -> None:
        self.ledger.retry(number, reason)
        self.recorder.tree_dropped(reason, self.config.rollout.leaves)

    # Learning

    async def _learn(self) -> None:
        every = self.config.checkpoint.every
        while self.version < self.config.run.steps and not self.stopping.is_set():
            batch = await self._next_batch()
            if batch is None:
                break
            await self._train(batch)
            if every and self.version % every == 0:
                await self.save()
            if self.config.eval.every and self.version % self.config.eval.every == 0:
                await self.evaluate("during")
            goal = self.config.run.stop_at_accuracy
            if goal and self.recorder.settled_accuracy >= goal:
                self.progress.note(f"training accuracy reached {goal}: stopping after step {self.version}")
                break
        await self.save()

    async def _next_batch(self) -> list[Closed] | None:
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

    async def _train(self, batch: Sequence[Closed]) -> None:
        """One training step and its weights on the engines; only then may trees of the new version start."""
        numbers = [one.entry.number for one in batch]
        trees = [one.tree for one in batch]
        version = self.version + 1
        self.ledger.train(numbers, version)
        self._write_ledger()
        async with self.weights:
            references = [one.entry.item[0] for one in batch]
            stats = (await self.crew.learner.all("train", self.version, *references))[0]
            if self.config.flow.update == "drained":
                with self._time("learner", "waiting for trees to close"):
                    await self._drained()
            with self._time("learner", "publishing weights"):
                for reason in (await self.push(version)).values():  # the fleet's watch sends them again
                    self.progress.note(f"weights {version} not taken yet: {reason}")
            lag = [self.version - _oldest(tree) for tree in trees]
            self.version = version
        self.ledger.trained(numbers)
        self._write_ledger()
        self._room.set()
        for tree in trees:
            self._trees.append(tree)
        self._record_idle()
        self.recorder.train_step(version, version, trees, stats, lag)
        self.recorder.flush(version)

    async def _drained(self) -> None:
        """Return when no tree grows, or at once when asked to stop.  Admission lets no end of trees start."""
        stopping = asyncio.ensure_future(self.stopping.wait())
        try:
            while self._growing and not stopping.done():
                await asyncio.wait({*self._growing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()

    async def push(self, version: int) -> dict[str, str]:
        """Send the learner's weights to all engines; returns those that did not take them, and why."""
        return (await self.crew.learner.all("publish", self.fleet.urls, version, LEARNER_DEADLINE_S))[0]

    async def publish(self) -> None:
        """Bring every engine to the current weights.  Raises ActorLost if one does not take them."""
        async with self.weights:
            if failures := await self.push(self.version):
                raise ActorLost(f"weights {self.version} were not taken: {'; '.join(failures.values())}")

    async def warm_start(self, demonstrations: Sequence[Tree]) -> None:
        """Supervised steps on ``demonstrations``, in seeded order, before anything else."""
        settings = self.config.warmstart
        self.progress.phase("warm start", total=settings.steps)
        rng = np.random.default_rng(self.config.run.seed)
        order = np.concatenate(
            [
                rng.permutation(len(demonstrations))
                for _ in range(-(-settings.steps * settings.batch // len(demonstrations)))
            ]
        )
        for step in range(settings.steps):
            if self.stopping.is_set():
                return
            rows = order[step * settings.batch : (step + 1) * settings.batch]
            lr = warm_start_lr(step, settings.steps, settings.lr)
            batch = [demonstrations[i] for i in rows]
            stats = (await self.crew.learner.all("supervise", lr, *batch))[0]
            self.progress.advance(1, f"loss {stats['loss']:.3f}")
        await self.crew.learner.all("reset_optimizer")

    # Evaluation, checkpoints

    async def evaluate(self, which: Which) -> EvalResult:
        """Greedy answers to the held-out questions with the engines' current weights."""
        questions = self.questions[: self.config.eval.questions]
        self.progress.phase("evaluating", total=len(questions))
        await self.fleet.ready()
        result = await evaluate(self.config, self.crew.growers, questions, self.progress.advance)
        self.recorder.evaluated(self.version, result, which)
        self.progress.note(f"held-out accuracy {which} training: {result.accuracy:.3f}")
        self.progress.phase(TRAINING)
        return result

    async def save(self) -> None:
        """A checkpoint of everything that a resumed run needs; older ones beyond ``checkpoint.keep`` go."""
        self._write_ledger(durable=True)
        path = self.run_dir.checkpoints / f"v{self.version:06d}"
        if not path.exists():
            extra = {"version": self.version, "recorder": self.recorder.state()}
            async with self.weights:
                await self.crew.learner.all("save", str(path), extra)
        remove_old_checkpoints(self.run_dir, self.config.checkpoint.keep)

    async def restore(self, path: Path) -> None:
        """Go on from the checkpoint at ``path``; the ledger has been replayed up to it already."""
        extra = (await self.crew.learner.all("load", str(path)))[0]
        self.recorder.restore(extra["recorder"])
        self.progress.note(f"resumed at step {self.version} from {path}")
        await self.publish()

    async def save_model(self) -> None:
        """Write the model in Hugging Face format."""
        await self.crew.learner.all("save_hf", str(self.run_dir.model))

    # Upkeep

    async def _read_gauges(self) -> None:
        while True:
            self.recorder.gauge(QUEUE_DEPTH, len(self.closed))
            self.recorder.gauge(GROWING, self.admission.running)
            await asyncio.sleep(GAUGE_S)

    def holdings(self) -> tuple[int, list[int], list[Entry[Any]]]:
        """For a replay queue that has to be filled again (``actors.replay.Holdings``)."""
        flight = {*self.ledger.numbers(State.GROWING), *self.ledger.numbers(State.QUEUED)}
        first = min(flight, default=self.ledger.next_number)
        gone = [number for number in range(first, self.ledger.next_number) if number not in flight]
        return first, gone, [closed.entry for closed in self.closed.values()]

    @contextlib.contextmanager
    def _time(self, actor: str, cause: str) -> Generator[None]:
        self._idle.enter(actor, cause, time.monotonic())
        try:
            yield
        finally:
            self._idle.leave(actor, cause, time.monotonic())

    def _record_idle(self) -> None:
        for actor, causes in self._idle.idle(time.monotonic()).items():
            for cause, seconds in causes.items():
                if cause != BUSY:
                    self.recorder.idle_total(actor, cause, seconds)

    def _write_ledger(self, durable: bool = False) -> None:
        for event in self.ledger.drain():
            self._log.write(event)
        if durable:
            self._log.sync()


def _seed(run_seed: int, number: int) -> int:
    return int(np.random.SeedSequence((run_seed, number)).generate_state(1)[0])


def _reason(failure: Exception) -> str:
    return failure.reason if isinstance(failure, GrowthFailed) else "worker lost"


def _oldest(tree: Tree) -> int:
    """The oldest weight version among a tree's sampled tokens."""
    versions = tree.version[tree.version >= 0]
    return int(versions.min()) if versions.size else 0


def remove_old_checkpoints(run_dir: RunDir, keep: int) -> None:
    for path in checkpoints(run_dir)[: -max(keep, 1)]:
        shutil.rmtree(path)


def checkpoints(run_dir: RunDir) -> list[Path]:
    """Complete checkpoints, oldest first (a checkpoint is renamed into place when it is whole)."""
    return sorted(path for path in run_dir.checkpoints.iterdir() if CHECKPOINT.fullmatch(path.name))
