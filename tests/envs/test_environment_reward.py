"""What a reward is shown of a branch's world."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from system.config import load
from system.plugins import REWARDS
from system.rollout.reward import BranchView
from system.rollout.scoring import ScoreFailed, ScorePool, Scoring
from system.tree.prompt import Prompt
from system.tree.record import Kind, Outcome

PROMPT = Prompt("p", ({"role": "user", "content": "?"},), ())


def view(result: dict[str, Any] | None, *steps: float) -> BranchView:
    return BranchView(((Kind.MODEL, "word"),), Outcome.ENDED, steps=steps, result=result)


@pytest.mark.parametrize(
    ("branch", "value", "correct"),
    [
        (view({"reward": 1}), 1.0, True),
        (view({"reward": 0.5}, 0.25), 0.5, False),  # the steps are added by whoever asked
        (view({"reward": 0.5}, 0.75, -0.25), 0.5, True),
        (view(None, 1.0), 0.0, True),
        (view({"other": 3}), 0.0, False),
    ],
)
async def test_the_worlds_own_reward(branch: BranchView, value: float, correct: bool) -> None:
    scoring = Scoring(REWARDS.make("environment", {}), "environment")
    score = await scoring.score(PROMPT, branch)
    assert (score.value, score.correct) == (value, correct)


async def test_what_is_no_number_is_no_score() -> None:
    scoring = Scoring(REWARDS.make("environment", {"right": 0.5}), "environment")
    assert (await scoring.score(PROMPT, view({"reward": 0.5}))).correct
    with pytest.raises(ScoreFailed, match="the world's reward is 'much', no number"):
        await scoring.score(PROMPT, view({"reward": "much"}))


def test_a_reward_in_a_process_of_its_own_sees_steps_and_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seen.py").write_text(
        "class Seen:\n    def score(self, prompt, branch):\n"
        "        return sum(branch.steps) + branch.result['state']['place']\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    pool = ScorePool(load(None, ["reward=seen:Seen"]))

    async def main() -> float:
        try:
            return (await pool.score(PROMPT, view({"state": {"place": 4}}, 0.5, 0.25))).value
        finally:
            await pool.close()

    assert asyncio.run(main()) == 4.75
