"""The conductor: gives the training loop its actors, and looks after engines, checkpoints and the records.

The loop itself stands in ``system/flow/loop.py``; what stands here is where its parts run.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.engine_monitor import EngineMonitor
from actors.evaluation import CLOSE_MARGIN_S, evaluate
from actors.in_flight import InFlightCheckpoint
from actors.ray_support import ActorLost, answer, returned
from actors.replay import ReplayHandle
from actors.rollout_pool import RunActors
from system.config import Config
from system.flow.ledger import Ledger, Ticket
from system.flow.loop import Closed, TrainingLoop, TreeLost
from system.learn.schedule import warm_start_lr
from system.observe.eval import EvalResult
from system.observe.jsonl import JsonlWriter
from system.observe.progress import TRAINING, Progress
from system.observe.recorder import GROWING, QUEUE_DEPTH, Recorder, Which
from system.observe.rundir import RunDir
from system.rollout import in_flight
from system.rollout.context import RolloutFailed
from system.rollout.snapshot import SnapshotError
from system.tree.prompt import Prompt
from system.tree.record import Tree
from system.tree.stats import TreeStats
from system.tree.store import TreeWriter

GAUGE_S = 1.0  # between readings of the gauges
COUNTERS_DEADLINE_S = 10.0
CHECKPOINT = re.compile(r"v\d{6}")


@dataclass(frozen=True, slots=True)
class Stored:
    """A closed tree in the object store."""

    reference: Any
    stats: TreeStats


class Conductor:
    """Runs training from ``version`` (0, or a checkpoint's) to ``config.run.steps``."""

    def __init__(
        self,
        config: Config,
        actors: RunActors,
        prompts: Mapping[str, Prompt],
        questions: Sequence[Prompt],
        ledger: Ledger,
        recorder: Recorder,
        run_dir: RunDir,
        progress: Progress,
        version: int = 0,
    ) -> None:
        self.config, self.actors, self.recorder, self.run_dir = config, actors, recorder, run_dir
        self.prompts, self.questions, self.ledger, self.progress = prompts, questions, ledger, progress
        self.replay = ReplayHandle(actors.replay, self)
        self.loop = TrainingLoop(config, ledger, self, self.replay, recorder, version=version)
        self.holdings = self.loop.holdings  # for a replay queue that has to be filled again
        self.monitor = EngineMonitor(actors.pool.engines, self, recorder, config.engine.start_deadline_s)
        self.in_flight = InFlightCheckpoint(config, ledger, self.loop, actors.pool.workers, recorder)
        self._log = JsonlWriter(run_dir.ledger_path)
        self._trees = TreeWriter(run_dir.trees, keep=config.observe.trees)

    @property
    def version(self) -> int:
        """The weights that the engines hold, or are about to."""
        return self.loop.version

    @property
    def weights(self) -> asyncio.Lock:
        """Held by whoever trains or publishes."""
        return self.loop.weights

    @property
    def stopping(self) -> asyncio.Event:
        return self.loop.stopping

    async def run(self) -> bool:
        """Train.  True at its end, False when it was asked to stop first (a checkpoint is saved).

        The end is ``run.steps``, or earlier by ``run.stop_at_accuracy``.
        """
        for warning in self.actors.learner.warnings:
            self.progress.note(warning)
        self.progress.phase(TRAINING)
        await self.monitor.ready()
        self.recorder.training_began()
        await self.replay.fill()
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(self.loop.admit(tasks), name="admission"),
                tasks.create_task(self.monitor.watch(), name="engine watch"),
                tasks.create_task(self._read_gauges(), name="gauges"),
            ]
            try:
                await self._learn()
                await self._read_counters()
                finished = not self.stopping.is_set() or self.version >= self.config.run.steps
            finally:
                self.stopping.set()
                self.loop.cancel_growing()
                for task in background:
                    task.cancel()
        self._trees.close()
        self.logged()
        return finished

    def stop(self) -> None:
        """Finish the training step under way, save, and return from ``run``."""
        self.loop.stop()

    # What the loop asks for (system.flow.loop.Parts)

    async def grow(self, ticket: Ticket, seed: int) -> tuple[Any, Tree]:
        """Grow a tree on its rollout worker.  The queue gets a reference in a list, lest Ray resolve it.

        One that a checkpoint kept goes on from there, or is there already.
        """
        start = self.in_flight.take(ticket.epoch, ticket.prompt_id)
        if start is not None and isinstance(start.tree, Tree):
            return [ray.put(start.tree)], start.tree
        worker = self.actors.pool.workers[ticket.number % len(self.actors.pool.workers)]
        reference = worker.grow.remote(
            self.prompts[ticket.prompt_id], ticket.number, seed, start and start.tree
        )
        deadline = self.config.rollout.tree_deadline_s + CLOSE_MARGIN_S
        try:
            return [reference], await answer(
                reference, deadline, f"rollout worker growing tree {ticket.number}"
            )
        except RolloutFailed as failure:
            raise TreeLost(failure.reason) from failure
        except SnapshotError as failure:
            self.progress.note(f"tree {ticket.number} cannot go on from its snapshot: {failure}")
            raise TreeLost("snapshot") from failure
        except ActorLost as failure:  # keep the place until its worker is back, or it is lost again
            workers = self.actors.pool.workers
            await returned(worker, f"rollout worker of tree {ticket.number}", lambda: worker not in workers)
            raise TreeLost("worker lost") from failure
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise

    async def train(self, version: int, batch: Sequence[Closed[Any]]) -> Mapping[str, float]:
        trees = [Stored(one.entry.item[0], TreeStats.of(one.tree)) for one in batch]
        return await self.actors.learner.train(version, trees)

    async def publish(self, version: int) -> None:
        """An engine that does not take the weights gets them from the fleet's watch."""
        for reason in (await self.push(version)).values():
            self.progress.note(f"weights {version} not taken yet: {reason}")

    def logged(self) -> None:
        for event in self.ledger.drain():
            self._log.write(event)

    # Learning

    async def _learn(self) -> None:
        every = self.config.checkpoint.every
        while self.version < self.config.run.steps and not self.stopping.is_set():
            batch = await self.loop.next_batch()
            if batch is None:
                break
            await self.loop.train(batch)
            for one in batch:
                self._trees.append(one.tree)
            self.recorder.flush(self.version)
            if every and self.version % every == 0:
                await self.save()
            if self.config.eval.every and self.version % self.config.eval.every == 0:
                await self.evaluate("during")
            goal = self.config.run.stop_at_accuracy
            if goal and self.recorder.settled_accuracy >= goal:
                self.progress.note(f"training accuracy reached {goal}: stopping after step {self.version}")
                break
        await self.save()

    async def push(self, version: int, urls: Sequence[str] = ()) -> dict[str, str]:
        """Send the learner's weights to the engines at ``urls``, to all without; returns those that did not
        take them, and why.
        """
        published = await self.actors.learner.publish(urls or self.monitor.urls, version)
        report = published.report
        self.recorder.weights_pushed(report.stage_s, list(report.pause_s.values()), report.bytes)
        return published.failures

    async def bring_up(self) -> None:
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
            stats = await self.actors.learner.supervise(batch, lr)
            self.progress.advance(1, f"loss {stats['loss']:.3f}")
        await self.actors.learner.reset_optimizer()

    # Evaluation, checkpoints

    async def evaluate(self, which: Which) -> EvalResult:
        """Greedy answers to the held-out questions with the engines' current weights."""
        questions = self.questions[: self.config.eval.questions]
        self.progress.phase("evaluating", total=len(questions))
        await self.monitor.ready()
        result = await evaluate(self.config, self.actors.pool, questions, self.progress.advance)
        self.recorder.evaluated(self.version, result, which)
        self.progress.note(f"held-out accuracy {which} training: {result.accuracy:.3f}")
        self.progress.phase(TRAINING)
        return result

    async def save(self) -> None:
        """A checkpoint of everything that a resumed run needs; older ones beyond ``checkpoint.keep`` go.

        The trees in flight are there before the learner's part appears: whoever finds that, finds them.
        """
        trees = await self.in_flight.collect()
        self.logged()
        self._log.sync()
        path = self.run_dir.checkpoints / f"v{self.version:06d}"
        await asyncio.to_thread(in_flight.write, saved_trees_path(path), trees)
        if not path.exists():
            extra = {"version": self.version, "recorder": self.recorder.state()}
            async with self.weights:
                await self.actors.learner.save(str(path), extra)
        remove_old_checkpoints(self.run_dir, self.config.checkpoint.keep)

    async def restore(self, path: Path) -> None:
        """Go on from the checkpoint at ``path``; the ledger has been replayed up to it already."""
        extra = await self.actors.learner.load(str(path))
        trees = self.in_flight.restore(saved_trees_path(path), extra["recorder"])
        self.progress.note(f"resumed at step {self.version} from {path}; {trees}")
        await self.bring_up()

    async def save_model(self) -> None:
        """Write the model in Hugging Face format."""
        await self.actors.learner.save_hf(str(self.run_dir.model))

    def spare(self, node: str, actors: Sequence[str]) -> bool:
        """A node is gone with ``actors``: true if the run goes on without them."""
        if self.config.cluster.on_node_loss != "continue" or not self.actors.pool.lose(actors):
            return False
        left = f"{len(self.monitor.urls)} engines, {len(self.actors.pool.workers)} rollout workers"
        self.progress.note(f"node {node} was lost with {', '.join(actors)}: going on with {left}")
        return True

    # Upkeep

    async def _read_gauges(self) -> None:
        while True:
            self.recorder.gauge(QUEUE_DEPTH, len(self.loop.closed))
            self.recorder.gauge(GROWING, self.loop.admission.running)
            await self._read_counters()
            await asyncio.sleep(GAUGE_S)

    async def _read_counters(self) -> None:
        """The workers' running totals; one that is being restarted is asked again next time."""
        named = {k: v for k, v in self.actors.pool.names.items() if v in self.actors.pool.workers}
        calls = (
            answer(worker.counters.remote(), COUNTERS_DEADLINE_S, "counters") for worker in named.values()
        )
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for worker, totals in zip(named, answers, strict=True):
            if isinstance(totals, ActorLost):
                continue
            if isinstance(totals, BaseException):
                raise totals
            for name, total in totals.items():
                self.recorder.running_total(worker, name, total)


def remove_old_checkpoints(run_dir: RunDir, keep: int) -> None:
    for path in checkpoints(run_dir)[: -max(keep, 1)]:
        shutil.rmtree(path)
    for path in run_dir.checkpoints.glob("*.trees"):
        if not path.with_suffix("").exists():
            path.unlink()


def saved_trees_path(checkpoint: Path) -> Path:
    """The trees in flight at a checkpoint, beside it."""
    return checkpoint.with_suffix(".trees")


def checkpoints(run_dir: RunDir) -> list[Path]:
    """Complete checkpoints, oldest first (a checkpoint is renamed into place when it is whole)."""
    return sorted(path for path in run_dir.checkpoints.iterdir() if CHECKPOINT.fullmatch(path.name))
