"""The evaluations of a run: when one is due, on which engines, and what becomes of it.

Without engines of their own (``eval.engines=0``) the engines of training answer while training stands still.
With them an evaluation gives these the weights of its step, which they keep until it is over, and training
goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ray.exceptions import RayError

from actors import keys
from actors.best_model import ModelChoice
from actors.engine_monitor import LOOK_S, EngineMonitor, Publisher
from actors.evaluate import ask_each
from actors.ray_support import ActorLost, watched
from actors.rollout_pool import RolloutPool, RunActors
from system.config import Config
from system.engine.control import HEALTH_DEADLINE_S, EngineControl, Silent, Unreachable
from system.engine.protocol import EngineError
from system.errors import EspalierError
from system.evals.record import Answered, Asked
from system.evals.result import EvalResult
from system.evals.table import in_line
from system.flow.loop import TrainingLoop
from system.observe.answer_file import AnswerFile
from system.observe.progress import TRAINING, Progress
from system.observe.recorder import Recorder, Which
from system.observe.rundir import RunDir
from system.observe.sinks import history
from system.rollout.failure import RolloutFailed
from system.text import described

_FAULTS = (ActorLost, RolloutFailed, EngineError, RayError)  # of actors: training does not end for them


class _WeightsLost(EspalierError, RuntimeError):
    """An engine does not hold the weights any more that are evaluated."""


class Evaluations:
    """Answers to the held-out questions before, during and after training, kept in files and recorded.

    The owner calls :meth:`before` once, :meth:`look` after each step, and :meth:`after` or :meth:`cut` last.
    """

    def __init__(
        self,
        config: Config,
        actors: RunActors,
        run_dir: RunDir,
        recorder: Recorder,
        progress: Progress,
        asked: Sequence[Asked],
        loop: TrainingLoop,
        publisher: Publisher,
        monitor: EngineMonitor,
        choice: ModelChoice,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """``asked``: at each evaluation; ``choice``: which model the run leaves."""
        self._config, self._pool, self._run_dir = config, actors.pool, run_dir
        self._recorder, self._progress, self._asked = recorder, progress, asked
        self._loop, self._publisher, self._monitor = loop, publisher, monitor
        self._clock, self._now = clock, now
        self._choice, self._lora_kept = choice, dict[int, float | None]()  # by step, of models to choose
        self._records: list[dict[str, Any]] | None = None  # of evaluations; None: not looked up yet
        self._begun = dict[Which, int]()  # the last step of each kind
        self._began_s = clock()  # when the last one did
        self._task: asyncio.Task[None] | None = None  # the evaluation on engines of its own
        self._told = ""  # what it is, for people

    async def before(self) -> None:
        """The evaluation of the weights that training begins with; on engines of its own, :meth:`look` begins
        it.
        """
        if self._pool.evaluation is None:
            await self._here("before")

    async def look(self) -> None:
        """Evaluate if it is due: here and now, or begin to on engines of its own if these are free."""
        if self._task is not None:
            if not self._task.done():
                return
            self._task.result()
            self._task = None
        own, version = self._pool.evaluation, self._loop.version
        if own is None:
            if self._due(version):
                await self._here("during")
        elif own.engines and own.workers:  # else their node is gone
            if "before" not in self._past:
                await self._begin(own, "before", 0)
            elif self._due(version):
                await self._begin(own, "during", version)

    async def after(self) -> None:
        """The evaluation of the trained weights, and the end of the one under way."""
        await self._here("after")
        if self._task is not None:
            if not self._task.done():
                self._progress.phase("evaluating", detail=self._told)
            await self._task

    async def cut(self) -> None:
        """End the evaluation under way; the resumed run makes it again."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._progress.note(f"{self._told} was cut off: the resumed run evaluates again")

    # When

    @property
    def records(self) -> list[dict[str, Any]]:
        """Those of all evaluations that count."""
        _ = self._past
        assert self._records is not None
        return self._records

    @property
    def _past(self) -> dict[Which, int]:
        """The step of the last evaluation of each kind that was begun; of earlier sessions, that ended."""
        if self._records is None:
            self._records = [one for one in history(self._run_dir.metrics_path) if "eval/which" in one]
            self._begun = {one["eval/which"]: one["step"] for one in self._records}
            if self._records:  # of an earlier session: its clock was another
                last = self._records[-1]
                ago_s = self._now() - (last["time"] - last["eval/seconds"])
                self._began_s = self._clock() - max(ago_s, 0.0)
            if self._choice.on:
                self._choice.keep_best(self._records)  # not those of evaluations that were cut off
        return self._begun

    def _due(self, version: int) -> bool:
        """Whether a multiple of ``eval.every`` has been passed since the last one began, or ``eval.every_s``
        seconds.
        """
        settings, last = self._config.eval, max(self._past.values(), default=0)
        every, every_s = settings.every, settings.every_s
        by_step = every > 0 and version // every > last // every
        by_time = 0 < every_s <= self._clock() - self._began_s
        return version > last and (by_step or by_time)

    def _begins(self, which: Which, version: int) -> None:
        self._past[which], self._began_s = version, self._clock()

    # Where

    async def _here(self, which: Which) -> None:
        """With the engines of training, and their current weights."""
        began, version = self._clock(), self._loop.version
        self._begins(which, version)
        self._progress.phase("evaluating", total=len(self._asked))
        await self._monitor.ready()
        async with self._loop.weights:
            await self._candidate(which, version)

        async def engines_back(cause: str) -> None:
            await self._monitor.ready()  # sends a restarted engine the weights, too

        found = await self._answers(self._pool, which, version, engines_back, self._progress.advance)
        seconds = self._clock() - began
        self._evaluated(which, version, found, seconds, seconds)
        self._progress.phase(TRAINING)

    async def _begin(self, own: RolloutPool, which: Which, version: int) -> None:
        """On engines of its own, which get the current weights first; a fault of theirs leaves it out."""
        self._begins(which, version)
        began, what = self._clock(), f"the evaluation of step {version}"
        try:
            if version == self._loop.version:
                await self._bring_up(own, which, version)
            elif self._config.warmstart.steps:
                self._progress.note(f"{what} was cut off, and its weights are gone: it is left out")
                return
            # Else the resumed run's engines hold the start weights, which those of step 0 are.
        except EngineError as error:
            self._recorder.mishap("evaluation left out", f"{what}: {error}")
            return
        self._told = what
        self._task = asyncio.create_task(self._aside(own, which, version, self._clock() - began), name=what)

    async def _bring_up(self, own: RolloutPool, which: Which, version: int) -> None:
        """Raises EngineError for an engine that does not answer or does not take the weights."""
        urls = [*own.engines.values()]
        async with keys.http(urls) as http:
            controls = [EngineControl(url, http) for url in urls]
            for control in controls:  # the learner must not wait for one that is gone
                await control.info(HEALTH_DEADLINE_S)
            async with self._loop.weights:
                if failures := await self._publisher.push(version, urls):
                    raise EngineError("; ".join(failures.values()))
                await self._candidate(which, version)
            for control in controls:
                if (await control.info()).paused:  # it was started again
                    await control.post("/continue_generation")

    async def _aside(self, own: RolloutPool, which: Which, version: int, waited_s: float) -> None:
        """Beside training.  Raises nothing that an actor of its own is to blame for."""
        began, what = self._clock() - waited_s, f"the evaluation of step {version}"

        async def engines_back(cause: str) -> None:
            raise _WeightsLost(cause)  # no other engine has them

        try:
            asking = self._answers(own, which, version, engines_back)
            found = await watched(asking, self._hold(own))
        except* (_WeightsLost, *_FAULTS) as errors:
            first: BaseException = errors
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            self._recorder.mishap("evaluation cut off", f"{what}: {described(first)}")
            if self._choice.on:
                self._choice.drop(version)
        else:
            self._evaluated(which, version, found, self._clock() - began, waited_s)

    async def _hold(self, own: RolloutPool) -> None:
        """Look after the engines until cancelled.  Raises _WeightsLost for one that was started again."""
        urls = [*own.engines.values()]
        async with keys.http(urls) as http:
            held: dict[str, int] = {}
            while True:
                for url in urls:
                    try:
                        info = await EngineControl(url, http).info(HEALTH_DEADLINE_S)
                    except Unreachable as error:
                        raise _WeightsLost(str(error)) from error
                    except Silent:  # slow, or gone: heartbeats see to that
                        continue
                    if info.paused or info.weight_version != held.setdefault(url, info.weight_version):
                        raise _WeightsLost(f"engine {url} was started again")
                await asyncio.sleep(LOOK_S)

    # What

    async def _candidate(self, which: Which, version: int) -> None:
        """Write the weights that are evaluated, where the run chooses a model; of step 0 there is none."""
        if self._choice.on and which != "before":
            self._lora_kept[version] = await self._choice.save(version)

    async def _answers(
        self,
        pool: RolloutPool,
        which: Which,
        version: int,
        engines_back: Callable[[str], Awaitable[None]],
        told: Callable[[], object] = lambda: None,
    ) -> list[Answered]:
        """In the file of ``version``; ``told`` of each."""
        path = self._run_dir.evals / f"v{version:06d}.jsonl"
        path.unlink(missing_ok=True)  # of a session that was lost: these may be other weights
        answers = AnswerFile(path, {"step": version, "which": which})

        def answered(answer: Answered) -> None:
            answers.add(answer)
            told()

        with contextlib.closing(answers):
            mishap = self._recorder.mishap
            return await ask_each(self._config, pool, self._asked, answered, engines_back, mishap)

    def _evaluated(
        self, which: Which, version: int, found: Sequence[Answered], seconds: float, waited_s: float
    ) -> None:
        result, kept = EvalResult.of(found), self._lora_kept.pop(version, None)
        more = {} if kept is None else {"lora_kept": kept}
        record = self._recorder.evaluated(version, result, which, seconds, waited_s, **more)
        self.records.append(record)
        if self._choice.on:
            self._choice.keep_best(self.records)
        if found:
            step = f" (step {version})" * (which == "during")
            self._progress.note(f"held-out accuracy {which} training{step}: {in_line(result)}")
