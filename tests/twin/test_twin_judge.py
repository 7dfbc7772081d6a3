"""A slow judge on the virtual clock: it is hidden behind generation, as long as trees take longer than it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

from twin_worlds import config, models

from system.config import ChosenReward
from system.rollout.reward import BranchView
from system.rollout.scorer import Scorer
from system.rollout.scoring import Scoring
from system.tree.prompt import Prompt
from system.twin.agent import AgentModel, AnswerReward
from system.twin.clock import run
from system.twin.dist import Constant, Lognormal
from system.twin.speeds import LinearEngine
from system.twin.world import Twin

STEPS = 12


class SlowJudge:
    """Answers after a second; one request in a hundred fails and is made again."""

    def __init__(self) -> None:
        self.rng, self.asked = random.Random(0), 0

    async def score(self, prompt: Prompt, branch: BranchView) -> float:
        while True:
            self.asked += 1
            await asyncio.sleep(1.0)
            if self.rng.random() >= 0.01:
                return 1.0
            await asyncio.sleep(0.5)


def played(judge: SlowJudge | None) -> Twin:
    words = ["rollout.leaves=8", "rollout.roots=4", "rollout.concurrency=64", "flow.batch_leaves=64"]
    agent = AgentModel(segment_tokens=Lognormal(50, 0.5), prompt_tokens=Constant(20))
    twin = Twin(config(*words), models(agent=agent, engine=LinearEngine(0.01, 0.0005)), STEPS)
    if judge:
        chosen = ChosenReward(name="judge", label="judge", weight=0.5, run="loop", deadline_s=60)
        scorers = [Scorer(AnswerReward()), Scorer(judge, chosen)]
        twin.context = replace(twin.context, scoring=Scoring(scorers))
    run(twin.run())
    return twin


def test_a_judge_of_a_second_costs_the_engine_no_time() -> None:
    judge = SlowJudge()
    without, beside = played(None), played(judge)
    idle, idle_beside = (twin.totals["idle"]["engine-0"] for twin in (without, beside))
    assert idle_beside - idle < 0.05
    assert judge.asked > STEPS * 64
    assert beside.context.scoring.counters["reward/close_wait_s"] > STEPS * 8 * 0.5  # it did take its time
    slower = beside.records[-1]["time/wall_s"] / without.records[-1]["time/wall_s"]
    assert slower < 1.1
