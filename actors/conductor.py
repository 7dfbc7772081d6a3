"""The conductor: runs the training loop over its actors, with evaluations, checkpoints and gauges between.

The loop itself stands in ``system/flow/loop.py``, what it asks of the actors in ``actors/parts.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from actors.best_model import ModelChoice
from actors.checkpoints import LINEAGE, Restored, prune, saved_trees_path
from actors.engine_monitor import EngineMonitor, EngineOutage, Publisher
from actors.evaluations import Evaluations
from actors.in_flight import InFlightCheckpoint
from actors.parts import ActorParts, Deaths
from actors.ray_support import ActorLost, answers_of_living
from actors.rollout_pool import RunActors
from actors.tree_sample import TreeSample
from system.config import Config
from system.evals.record import Asked
from system.flow.curriculum import PoolWeights
from system.flow.guidance import Guides
from system.flow.ledger import Ledger, lineage
from system.flow.loop import GaveUp, TrainingLoop
from system.flow.replay import TreeInFlight
from system.observe.jsonl import JsonlWriter, read_jsonl
from system.observe.progress import TRAINING, Progress
from system.observe.recorder import GROWING, QUEUE_DEPTH, Recorder
from system.observe.rundir import RunDir
from system.sft.demonstrations import warm_start
from system.tasks.base import Task
from system.tree.record import Tree

GAUGE_S = 1.0  # between readings of the gauges
COUNTERS_DEADLINE_S = 10.0


class Conductor:
    """Runs training to ``config.run.steps``: a new run, or one that goes on from its newest checkpoint."""

    def __init__(
        self,
        config: Config,
        actors: RunActors,
        task: Task,
        run_dir: RunDir,
        recorder: Recorder,
        progress: Progress,
        asked: Sequence[Asked],
        version: int,
        choice: ModelChoice,
    ) -> None:
        """``asked``: at each evaluation; ``version``: of the checkpoint that the learner holds, 0 without
        one; ``choice``: which model the run leaves.
        """
        self.config, self.actors, self.recorder = config, actors, recorder
        self.run_dir, self.progress = run_dir, progress
        prompts = {prompt.id: prompt for prompt in task.train()}
        self._log, logged = JsonlWriter(run_dir.ledger_path), read_jsonl(run_dir.ledger_path)
        ledger = Ledger.replay(
            [*prompts],
            config.run.seed,
            logged,
            version,
            config.flow.max_attempts,
            self._log.write,
            PoolWeights.of(config),
            Guides.of(config, prompts.values()),
        )
        self._publisher = Publisher(actors.learner, actors.pool.engines, recorder)
        self._in_flight = InFlightCheckpoint(config, ledger, actors.pool.workers, recorder)
        outage = EngineOutage(config, actors.pool.engines)
        deaths = Deaths(config.cluster.worker_restarts)
        parts = ActorParts(
            config, actors, prompts, self._in_flight, self._publisher, progress, outage, deaths
        )
        self.loop = TrainingLoop(config, ledger, parts, recorder, version=version)
        engines, deadline_s = actors.pool.engines, config.engine.start_deadline_s
        self._monitor = EngineMonitor(engines, self.loop, self._publisher, recorder, deadline_s)
        around = (self.loop, self._publisher, self._monitor, choice)
        self.evaluations = Evaluations(config, actors, run_dir, recorder, progress, asked, *around)
        observe = config.observe
        self._trees = TreeSample(run_dir, observe.trees, observe.tree_sample, recorder.mishap)

    @property
    def version(self) -> int:
        """The weights that the engines hold, or are about to."""
        return self.loop.version

    async def run(self) -> bool:
        """Train.  True at its end, False when it was asked to stop first (a checkpoint is saved).

        The end is ``run.steps``, or earlier by ``run.stop_at_accuracy``.  Raises GaveUp when trees only fail;
        a checkpoint is saved then, too.
        """
        for warning in self.actors.learner.warnings:
            self.progress.note(warning)
        self.progress.phase(TRAINING)
        await self._monitor.ready()
        self.recorder.training_began()
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(self.loop.admit(), name="admission"),
                tasks.create_task(self._monitor.watch(), name="engine watch"),
                tasks.create_task(self._read_gauges(), name="gauges"),
            ]
            try:
                try:
                    await self._learn()
                except GaveUp:
                    await self.save()
                    await self.saved()
                    raise
                await self.read_counters()
                finished = not self.loop.stopping.is_set() or self.version >= self.config.run.steps
            finally:
                self.loop.stop()
                for task in background:
                    task.cancel()
        if not finished:
            await self.evaluations.cut()
        await self._trees.written()
        return finished

    async def _learn(self) -> None:
        every = self.config.checkpoint.every
        if self.version < self.config.run.steps:  # else comes an evaluation anyway
            await self.evaluations.look()  # what a resumed run owes
        while self.version < self.config.run.steps and (batch := await self._stepped()) is not None:
            if self.version >= self.config.run.steps:
                self.loop.start_no_more()
            await self._trees.add(batch)
            self.recorder.flush(self.version)
            await self.saved(wait=False)
            if every and self.version % every == 0:
                await self.save()
            goal = self.config.run.stop_at_accuracy
            reached = bool(goal) and self.recorder.settled_accuracy >= goal
            if not reached and self.version < self.config.run.steps:  # else comes an evaluation anyway
                await self.evaluations.look()
            if reached:
                self.progress.note(f"training accuracy reached {goal}: stopping after step {self.version}")
                break
        await self.save()
        await self.saved()

    async def _stepped(self) -> Sequence[TreeInFlight] | None:
        """The loop's next step, which is watched: it must not take far longer than those before."""
        self.recorder.stall.began()
        try:
            return await self.loop.step()
        finally:
            self.recorder.stall.ended()

    async def bring_up(self) -> None:
        """Bring every engine to the current weights.  Raises ActorLost if one does not take them."""
        async with self.loop.weights:
            if failures := await self._publisher.push(self.version):
                raise ActorLost(f"weights {self.version} were not taken: {'; '.join(failures.values())}")

    async def warm_start(self, demonstrations: Sequence[Tree]) -> None:
        """Supervised steps on ``demonstrations``, in seeded order, before anything else."""
        self.progress.phase("warm start", total=self.config.warmstart.steps)
        for trees, lr in warm_start(self.config, demonstrations):
            if self.loop.stopping.is_set():
                return
            stats = await self.actors.learner.supervise(trees, lr)
            self.progress.advance(1, f"loss {stats['loss']:.3f}")
        await self.actors.learner.reset_optimizer()

    # Checkpoints

    async def save(self) -> None:
        """Begin a checkpoint of everything that a resumed run needs; it is there once :meth:`saved` says so.

        The trees in flight are there before the learner's part appears: whoever finds that, finds them.
        """
        await self.saved()
        trees = await self._in_flight.collect(self.loop.replay)
        self._log.sync()
        path = self.run_dir.checkpoints / f"v{self.version:06d}"
        await self._trees.written()  # one process of Ray's writes both, in turn
        await self._in_flight.write(saved_trees_path(path), trees, again=path.exists())
        if not path.exists():
            trained_on = lineage(self.loop.ledger.updates, self.version)
            extra = {"version": self.version, LINEAGE: trained_on, "recorder": self.recorder.state()}
            async with self.loop.weights:
                await self.actors.learner.save(str(path), extra)

    async def saved(self, *, wait: bool = True) -> None:
        """Older checkpoints beyond ``checkpoint.keep`` go if the last one is there; ``wait`` until it is."""
        if await self.actors.learner.saved(wait=wait):
            prune(self.run_dir, self.config.checkpoint.keep)

    async def restore(self, found: Restored) -> None:
        """Go on from a checkpoint; the ledger has been replayed up to it already."""
        trees = self._in_flight.restore(saved_trees_path(found.path), found.extra["recorder"])
        self.progress.note(f"resumed at step {self.version} from {found.path}; {trees}")
        await self.bring_up()

    def spare(self, node: str, actors: Sequence[str]) -> bool:
        """A node is gone with ``actors``: true if the run goes on without them."""
        if self.config.cluster.on_node_loss != "continue" or not self.actors.pool.lose(actors):
            return False
        left = f"{len(self.actors.pool.engines)} engines, {len(self.actors.pool.workers)} rollout workers"
        self.progress.note(f"node {node} was lost with {', '.join(actors)}: going on with {left}")
        return True

    # Upkeep

    async def _read_gauges(self) -> None:
        while True:
            self.recorder.gauge(QUEUE_DEPTH, len(self.loop.replay))
            self.recorder.gauge(GROWING, len(self.loop.ledger.growing))
            await self.read_counters()
            self.recorder.look_for_stall()
            await asyncio.sleep(GAUGE_S)

    async def read_counters(self) -> None:
        """The workers' running totals; one that is being restarted is asked again next time."""
        pool = self.actors.pool
        workers = pool.workers | (pool.evaluation.workers if pool.evaluation else {})
        calls = {name: worker.counters.remote() for name, worker in workers.items()}
        for worker, totals in (await answers_of_living(calls, COUNTERS_DEADLINE_S, "counters")).items():
            for name, total in totals.items():
                self.recorder.running_total(worker, name, total)
