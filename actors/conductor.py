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
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.crew import Crew
from actors.evaluation import evaluate
from actors.learner import LEARNER_DEADLINE_S
from actors.replay import NotFilled
from actors.supervise import ActorLost, answer
from system.config import Config
from system.engine.client import EngineClient
from system.engine.protocol import EngineError
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
WATCH_S = 1.0  # between looks at the engines
CLOSE_MARGIN_S = 30.0  # a worker may take this much longer than a tree's deadline to answer
REPLAY_DEADLINE_S = 60.0
REPLAY_ATTEMPTS = 5
ENGINE_DEADLINE_S = 180.0  # for an engine to be restarted and to hold the current weights
IDLE_COUNTER = re.compile(r"idle_(\w+)_s")  # the engine's counters of idle seconds by cause
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
        self.stopping = asyncio.Event()
        self._room = asyncio.Event()  # something changed that may let another tree start
        self._idle = IdleClock()
        self._idle_told: dict[tuple[str, str], float] = {}
        self._growing: set[asyncio.Task[None]] = set()
        self._weights = asyncio.Lock()  # whoever trains or publishes; keeps the ranks' calls in one order
        self._log = JsonlWriter(run_dir.ledger_path)
        self._trees = TreeWriter(run_dir.trees, keep=config.observe.trees)

    async def run(self) -> bool:
        """Train.  True when all steps are done, False when it was asked to stop first (a checkpoint is
        saved).
        """
        self.progress.phase(TRAINING)
        await self._refill_replay()
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(self._admit(tasks), name="admission"),
                tasks.create_task(self._watch_engines(), name="engine watch"),
            ]
            try:
                await self._learn()
            finally:
                self.stopping.set()
                for task in (*background, *self._growing):
                    task.cancel()
        self._trees.close()
        self._write_ledger()
        return self.version >= self.config.run.steps

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
            self._lose(ticket.number, _reason(failure))
            self.admission.finish(leaves, 0)
            await self._replay("put", [], [ticket.number])
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise
        else:
            entry = Entry(ticket.number, born, [reference], leaves)
            self.closed[ticket.number] = Closed(entry, tree)
            self.admission.finish(leaves, tree.n_leaves)
            self.ledger.queue(ticket.number)
            self.recorder.tree_closed(tree, self.version)
            await self._replay("put", [entry], [])
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
                taken = await self._replay("take", self.version, TAKE_WAIT_S)
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
        async with self._weights:
            references = [one.entry.item[0] for one in batch]
            stats = (await self.crew.learner.all("train", self.version, *references))[0]
            with self._time("learner", "publishing weights"):
                for reason in (await self._publish(version)).values():  # the engine watch sends them again
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

    async def _publish(self, version: int) -> dict[str, str]:
        """Push the learner's weights to all engines.  Returns those that did not take them, and why."""
        return (
            await self.crew.learner.all("publish", self.crew.growers.engines, version, LEARNER_DEADLINE_S)
        )[0]

    async def publish(self) -> None:
        """Bring every engine to the current weights.  Raises ActorLost if one does not take them."""
        async with self._weights:
            if failures := await self._publish(self.version):
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
        await self._wait_for_engines()
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
            async with self._weights:
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

    async def _watch_engines(self) -> None:
        """Read the gauges, and keep every engine at the current weights.

        Raises ActorLost for an engine that could not be brought to them for ``ENGINE_DEADLINE_S``.
        """
        async with self._engines() as clients:
            good = [time.monotonic()] * len(clients)
            while True:
                await asyncio.sleep(WATCH_S)
                self.recorder.gauge(QUEUE_DEPTH, len(self.closed))
                self.recorder.gauge(GROWING, self.admission.running)
                for number, client in enumerate(clients):
                    if await self._tend(number, client):
                        good[number] = time.monotonic()
                    elif time.monotonic() - good[number] > ENGINE_DEADLINE_S:
                        raise ActorLost(_not_back(client))

    async def _wait_for_engines(self) -> None:
        """Return once every engine holds the current weights."""
        async with self._engines() as clients:
            for number, client in enumerate(clients):
                try:
                    async with asyncio.timeout(ENGINE_DEADLINE_S):
                        while not await self._tend(number, client):  # noqa: ASYNC110 (a process, not a task)
                            await asyncio.sleep(WATCH_S)
                except TimeoutError as error:
                    raise ActorLost(_not_back(client)) from error

    @contextlib.asynccontextmanager
    async def _engines(self) -> AsyncIterator[list[EngineClient]]:
        clients = [EngineClient([url]) for url in self.crew.growers.engines]
        try:
            yield clients
        finally:
            for client in clients:
                await client.close()

    async def _tend(self, number: int, client: EngineClient) -> bool:
        """Account an engine's idle time; send it the current weights if it lacks them.  True: it has them."""
        try:
            (info,) = await client.infos()
            for counter, seconds in info.counters.items():
                if cause := IDLE_COUNTER.fullmatch(counter):
                    self._tell_idle(f"engine-{number}", cause[1], seconds)
            if info.weight_version == self.version and not info.paused:
                return True
            async with self._weights:  # a training step under way pushes new ones itself
                (info,) = await client.infos()
                if info.weight_version == self.version and not info.paused:
                    return True
                self.progress.note(f"engine-{number} was restarted: sending it weights {self.version}")
                await self._publish(self.version)
                await client.resume()  # a restarted engine stands paused
        except EngineError:  # it is being restarted
            return False
        return True

    async def _replay(self, method: str, *arguments: Any) -> Any:
        """Call the replay actor; one that was restarted is filled again from what the conductor owns."""
        for _ in range(REPLAY_ATTEMPTS):
            try:
                return await answer(
                    getattr(self.crew.replay, method).remote(*arguments), REPLAY_DEADLINE_S, "replay"
                )
            except (NotFilled, ActorLost):
                await self._refill_replay()
                if method == "put":  # the refill has put it already
                    return None
        raise ActorLost("replay: restarted too often")

    async def _refill_replay(self) -> None:
        flight = {*self.ledger.numbers(State.GROWING), *self.ledger.numbers(State.QUEUED)}
        first = min(flight, default=self.ledger.next_number)
        gone = [number for number in range(first, self.ledger.next_number) if number not in flight]
        entries = [closed.entry for closed in self.closed.values()]
        await answer(self.crew.replay.fill.remote(first, gone, entries), REPLAY_DEADLINE_S, "replay")

    @contextlib.contextmanager
    def _time(self, actor: str, cause: str) -> Iterator[None]:
        self._idle.enter(actor, cause, time.monotonic())
        try:
            yield
        finally:
            self._idle.leave(actor, cause, time.monotonic())

    def _record_idle(self) -> None:
        for actor, causes in self._idle.idle(time.monotonic()).items():
            for cause, seconds in causes.items():
                if cause != BUSY:
                    self._tell_idle(actor, cause, seconds)

    def _tell_idle(self, actor: str, cause: str, total_s: float) -> None:
        """Give the recorder what a running total has gained; one that was reset starts from zero again."""
        told = self._idle_told.get((actor, cause), 0.0)
        self.recorder.idle(actor, cause, total_s - told if total_s >= told else total_s)
        self._idle_told[actor, cause] = total_s

    def _write_ledger(self, durable: bool = False) -> None:
        for event in self.ledger.drain():
            self._log.write(event)
        if durable:
            self._log.sync()


def _not_back(client: EngineClient) -> str:
    return f"engine {client.urls[0]}: not back with the current weights within {ENGINE_DEADLINE_S:.0f} s"


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
