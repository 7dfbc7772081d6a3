"""Small worlds for the twin's tests."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from system.config import Config, load
from system.flow.loop import TrainingLoop
from system.flow.replay import TreeInFlight
from system.tree.record import Tree
from system.twin.agent import AgentModel
from system.twin.dist import Constant
from system.twin.speeds import LinearEngine, LinearLearner
from system.twin.tools import ToolModel
from system.twin.world import Models, Twin

FAR = ("generate", "branch", "tree")


def config(*overrides: str) -> Config:
    return load(
        None,
        [
            "rollout.leaves=4",
            "rollout.roots=2",
            "rollout.concurrency=8",
            "rollout.call_limit=3",
            "rollout.max_response_tokens=2000",
            "rollout.max_tool_result_tokens=200",
            "engine.max_context=4000",
            "flow.batch_leaves=16",
            *(f"rollout.{name}_deadline_s=1e9" for name in FAR),
            *overrides,
        ],
    )


def models(**changes: Any) -> Models:
    plain: dict[str, Any] = {
        "engine": LinearEngine(0.01, 0.001, per_prefill_s=1e-4),
        "learner": LinearLearner(1.0, 1e-4),
        "agent": AgentModel(segment_tokens=Constant(50), prompt_tokens=Constant(20)),
        "tools": {"search": ToolModel(Constant(1.0), Constant(20))},
        "publish_s": 0.5,
        "update_s": 0.1,
    }
    return Models(**(plain | changes))


class KeepingTwin(Twin):
    """Keeps the trees that it has trained on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.trees: list[Tree] = []

    async def train(self, version: int, trees: Sequence[TreeInFlight]) -> Mapping[str, float]:
        stats = await super().train(version, trees)
        self.trees += [tree.reference for tree in trees]
        return stats


@dataclass(frozen=True, slots=True)
class Failure:
    """``what`` fails at ``at_s`` and is back ``for_s`` later (virtual seconds).

    ``engine`` names one by ``which``; ``learner`` ends the session in this or the next training step, and the
    run resumes from the last checkpoint.
    """

    at_s: float
    what: Literal["engine", "tool", "learner"]
    which: int = 0
    for_s: float = 30.0

    async def strike(self, twin: FailingTwin) -> None:
        await asyncio.sleep(self.at_s)
        match self.what:
            case "learner":
                if not twin.died.done():
                    twin.died.set_result(None)
            case "tool":
                twin.tools.set_down(True)
                await asyncio.sleep(self.for_s)
                twin.tools.set_down(False)
            case "engine":
                engine = twin.engines[self.which % len(twin.engines)]
                if not engine.alive:
                    return
                engine.kill()
                await asyncio.sleep(self.for_s)
                async with twin.loop.weights:  # the fleet's watch sends it the current weights
                    await asyncio.sleep(twin.models.publish_s)
                    engine.restart(twin.loop.version)


class LearnerDied(RuntimeError):
    pass


@dataclass
class FailingTwin(KeepingTwin):
    """Runs to its end through every failure; a checkpoint is made every three steps."""

    failures: Sequence[Failure] = ()
    checkpoint: int = 0  # the weights that the next session begins with
    sessions: int = 0

    async def run(self) -> None:
        pending = [asyncio.create_task(one.strike(self), name=f"{one}") for one in self.failures]
        try:
            await super().run()
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def session(self, version: int = 0) -> None:
        ended = False
        while not ended:
            self.sessions += 1
            self.died = asyncio.get_running_loop().create_future()
            try:
                await super().session(self.checkpoint)
                ended = True
            except* LearnerDied:
                pass

    async def step(self, loop: TrainingLoop) -> None:
        await super().step(loop)
        if loop.version % 3 == 0:
            self.checkpoint = loop.version

    async def train(self, version: int, trees: Sequence[TreeInFlight]) -> Mapping[str, float]:
        training = asyncio.ensure_future(super().train(version, trees))
        await asyncio.wait({training, self.died}, return_when=asyncio.FIRST_COMPLETED)
        if self.died.done():
            training.cancel()
            raise LearnerDied
        return training.result()


def surviving(events: Sequence[dict[str, Any]]) -> list[tuple[int, tuple[int, str]]]:
    """(version, (epoch, prompt)) of every tree that the final weights were trained on."""
    issued = {e["number"]: (e["epoch"], e["prompt"]) for e in events if e["event"] == "issue"}
    updates: list[tuple[int, list[int]]] = []
    for event in events:
        if event["event"] == "train":
            updates.append((event["version"], event["numbers"]))
        elif event["event"] == "restore":
            updates = [update for update in updates if update[0] <= event["trained_through"]]
    return [(version, issued[number]) for version, numbers in updates for number in numbers]
