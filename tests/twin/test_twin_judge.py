"""A slow judge on the virtual clock: it is hidden behind generation where staleness leaves room for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from twin_worlds import config, models

from system.flow.replay import TreeInFlight
from system.twin.agent import AgentModel
from system.twin.clock import run
from system.twin.dist import Constant, Lognormal
from system.twin.judge import JudgeModel
from system.twin.records import TwinResult, mean_over_engines
from system.twin.speeds import LinearEngine, LinearLearner
from system.twin.tools import ToolModel
from system.twin.world import Models, Twin

STEPS, FILL = 14, 6
WORDS = ("rollout.leaves=8", "rollout.roots=4", "rollout.concurrency=64", "flow.batch_leaves=64")
AGENT = AgentModel(segment_tokens=Lognormal(50, 0.5), prompt_tokens=Constant(20))
TREES_A_STEP = 8


class CountingTwin(Twin):
    """Knows how many trees were in flight when each training step began."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.in_flight: list[int] = []

    async def train(self, version: int, trees: Sequence[TreeInFlight]) -> Mapping[str, float]:
        self.in_flight.append(self.loop.ledger.in_flight)
        return await super().train(version, trees)


def played(world: Models, judge: JudgeModel | None, staleness: int = 1) -> CountingTwin:
    twin = CountingTwin(config(*WORDS, f"flow.staleness={staleness}"), world, STEPS, judge=judge)
    run(twin.run())
    return twin


def slow_judge() -> JudgeModel:
    return JudgeModel(1.0, 0.01)


def idle(result: TwinResult) -> float:
    return mean_over_engines(result.idle)


def test_a_judge_of_a_second_costs_the_engine_no_time_where_trees_take_longer() -> None:
    world, judge = models(agent=AGENT, engine=LinearEngine(0.01, 0.0005)), slow_judge()
    without, beside = played(world, None), played(world, judge)
    idle_in = [twin.totals["idle"]["engine-0"] for twin in (without, beside)]
    assert idle_in[1] - idle_in[0] < 0.05
    assert judge.requests > STEPS * 64
    assert beside.context.scoring.counters["reward/close_wait_s"] > STEPS * 8 * 0.5  # it did take its time
    slower = beside.records[-1]["time/wall_s"] / without.records[-1]["time/wall_s"]
    assert slower < 1.1


def test_where_trees_take_less_staleness_makes_room_for_the_judge() -> None:
    agent = AgentModel(segment_tokens=Lognormal(20, 0.5), prompt_tokens=Constant(20))
    engine, learner = LinearEngine(0.0025, 0.0004), LinearLearner(0.05, 1e-5)
    quick = {"search": ToolModel(Constant(0.02), Constant(20))}
    world = models(agent=agent, engine=engine, learner=learner, tools=quick, publish_s=0.05, update_s=0.0)
    without, beside, roomy = (
        played(world, *how) for how in ((None, 1), (slow_judge(), 1), (slow_judge(), 3))
    )
    idle_in = [idle(twin.result(FILL)) for twin in (without, beside, roomy)]
    assert idle_in[1] - idle_in[0] > 0.1
    assert set(beside.in_flight) == {2 * TREES_A_STEP}  # it is the bound that keeps the engine waiting
    assert idle_in[2] - idle_in[0] < 0.05
    assert roomy.result(FILL).step_s < 1.1 * without.result(FILL).step_s
