"""The engines as the driver sees them: do they hold the current weights, and what do they wait for?"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Mapping, Sequence

from actors import keys
from actors.learner import LearnerGroup
from actors.ray_support import ActorLost
from system.config import Config
from system.engine.control import EngineControl
from system.engine.protocol import SPEED_COUNTERS, EngineError, EngineInfo
from system.flow.loop import TrainingLoop
from system.observe.recorder import Recorder

PUSH_DEADLINE_S = 120.0  # for an engine that is back to hold the current weights, after its own start
LOOK_S = 1.0  # between looks at the engines
IDLE_COUNTER = re.compile(r"idle_(\w+)_s")  # an engine's counters of idle seconds by cause


class Publisher:
    """Sends the learner's weights to the engines."""

    def __init__(self, learner: LearnerGroup, engines: Mapping[str, str], recorder: Recorder) -> None:
        self._learner, self._engines, self._recorder = learner, engines, recorder

    async def push(self, version: int, urls: Sequence[str] = ()) -> Mapping[str, str]:
        """To the engines at ``urls``, to all without; returns those that did not take them, and why."""
        report = await self._learner.publish(urls or [*self._engines.values()], version)
        self._recorder.weights_pushed(report.stage_s, list(report.pause_s.values()), report.bytes)
        if report.lora_kept is not None:
            self._recorder.merged(report.lora_kept)
        return report.failures


class EngineOutage:
    """From the first tree that lost its engine to the next one that closes."""

    def __init__(self, config: Config, engines: Mapping[str, str]) -> None:
        # A tree that starts when the engines are back takes its time.
        self._start_s = config.engine.start_deadline_s + PUSH_DEADLINE_S
        self._deadline_s = self._start_s + config.rollout.tree_deadline_s
        self._engines, self._began_s, self._look = engines, math.inf, asyncio.Lock()

    def over(self) -> None:
        """A tree has closed."""
        self._began_s = math.inf

    async def wait(self, cause: str) -> None:
        """Return once an engine answers, if none has its weights yet.  Raises ActorLost if none answers in
        time, or if trees have only lost their engines for so long.
        """
        began = self._began_s = min(self._began_s, time.monotonic())
        if time.monotonic() - began > self._deadline_s:
            raise ActorLost(f"no engine has served a tree for {self._deadline_s:.0f} s: {cause}")
        urls = [*self._engines.values()]
        async with self._look, keys.http(urls) as http:  # one of the trees looks for all
            controls = [EngineControl(url, http) for url in urls]
            tasks = [asyncio.create_task(control.wait_ready(self._start_s)) for control in controls]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                answers = await asyncio.gather(*tasks, return_exceptions=True)
        if all(isinstance(answer, EngineError) for answer in answers):
            raise ActorLost(f"no engine has answered for {self._start_s:.0f} s: {cause}")
        await asyncio.sleep(LOOK_S)


class EngineMonitor:
    """Keeps engines at the training loop's version; a restarted one stands paused until it has its weights.

    ``engines`` (URLs by name) may lose members while the run goes on: those whose node is gone.
    """

    def __init__(
        self,
        engines: Mapping[str, str],
        loop: TrainingLoop,
        publisher: Publisher,
        recorder: Recorder,
        start_deadline_s: float,
    ) -> None:
        """``start_deadline_s``: for a restarted engine to answer."""
        self._engines, self._loop, self._publisher, self._recorder = engines, loop, publisher, recorder
        self._deadline_s = start_deadline_s + PUSH_DEADLINE_S
        self._refused: dict[str, str] = {}  # by URL: why its last push was not taken

    async def watch(self) -> None:
        """Look after the engines until cancelled.  Raises ActorLost for one that does not come back."""
        async with keys.http(self._engines.values()) as http:
            controls = {name: EngineControl(url, http) for name, url in self._engines.items()}
            good = dict.fromkeys(controls, time.monotonic())
            while True:
                for name, control in controls.items():
                    if name not in self._engines or await self._tend(name, control):
                        good[name] = time.monotonic()
                    elif time.monotonic() - good[name] > self._deadline_s:
                        raise ActorLost(self._not_back(control.url))
                await asyncio.sleep(LOOK_S)

    async def ready(self) -> None:
        """Return once every engine holds the current weights; ActorLost at the deadline."""
        async with keys.http(self._engines.values()) as http:
            for name, url in list(self._engines.items()):
                control = EngineControl(url, http)
                try:
                    async with asyncio.timeout(self._deadline_s):
                        while name in self._engines and not await self._tend(name, control):  # noqa: ASYNC110
                            await asyncio.sleep(LOOK_S)
                except TimeoutError as error:
                    raise ActorLost(self._not_back(url)) from error

    async def _tend(self, name: str, control: EngineControl) -> bool:
        """Account an engine's idle time; send it the current weights if it lacks them.  True: it has them."""
        try:
            info = await control.info()
            for counter, seconds in info.counters.items():
                if cause := IDLE_COUNTER.fullmatch(counter):
                    self._recorder.idle_total(name, cause[1], seconds)
            for counter in SPEED_COUNTERS:
                if counter in info.counters:
                    self._recorder.running_total(name, f"server/{counter}", info.counters[counter])
            if self._current(info):
                self._refused.pop(control.url, None)  # what is wrong next is something else
                return True
            async with self._loop.weights:
                info = await control.info()
                if not self._current(info):  # no training step was just pushing them
                    if failures := await self._publisher.push(self._loop.version, [control.url]):
                        self._refused |= failures
                        return False
                    await control.post("/continue_generation")
            self._refused.pop(control.url, None)
        except EngineError:  # it is being restarted
            return False
        return True

    def _not_back(self, url: str) -> str:
        why = self._refused.get(url, "see the run's logs/")
        return (
            f"engine {url}: not back with the current weights within {self._deadline_s:.0f} s "
            f"(engine.start_deadline_s): {why}"
        )

    def _current(self, info: EngineInfo) -> bool:
        return info.weight_version == self._loop.version and not info.paused
