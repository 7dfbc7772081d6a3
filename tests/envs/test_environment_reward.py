"""What a reward is shown of a branch's world."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from system.config import load
from system.rollout.reward import BranchView, Score, ScoreFailed
from system.rollout.scoring import Scoring
from system.tree.prompt import Prompt
from system.tree.record import Kind, Outcome

PROMPT = Prompt("p", ({"role": "user", "content": "?"},), ())


def view(result: dict[str, Any] | None, *steps: float) -> BranchView:
    return BranchView(((Kind.MODEL, "word"),), Outcome.ENDED, steps=steps, result=result)


async def scored(scoring: Scoring, branch: BranchView) -> Score:
    """What the run's one reward says of a branch, the environment's own steps added."""
    try:
        (found,) = await scoring.scorers[0].score(PROMPT, [branch])
    finally:
        await scoring.close()
    if isinstance(found, ScoreFailed):
        raise found
    return scoring.total([found], branch)


@pytest.mark.parametrize(
    ("branch", "value", "correct"),
    [
        (view({"reward": 1}), 1.0, True),
        (view({"reward": 0.5}, 0.25), 0.75, False),
        (view({"reward": 0.5}, 0.75, -0.25), 1.0, True),
        (view(None, 1.0), 1.0, True),
        (view({"other": 3}), 0.0, False),
    ],
)
async def test_the_worlds_own_reward(branch: BranchView, value: float, correct: bool) -> None:
    score = await scored(Scoring.of(load(None, ["reward=environment"])), branch)
    assert (score.value, score.correct) == (value, correct)
    assert score.parts == ({"steps": sum(branch.steps)} if branch.steps else {})


async def test_what_is_no_number_is_no_score() -> None:
    config = load(None, ["reward=environment", "reward.options.right=0.5"])
    assert (await scored(Scoring.of(config), view({"reward": 0.5}))).correct
    with pytest.raises(ScoreFailed, match="the world's reward is 'much', no number"):
        await scored(Scoring.of(config), view({"reward": "much"}))


def test_a_reward_in_a_process_of_its_own_sees_steps_and_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seen.py").write_text(
        "class Seen:\n    def score(self, prompt, branch):\n"
        "        return sum(branch.steps) + branch.result['state']['place']\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    scoring = Scoring.of(load(None, ["reward=seen:Seen"]))
    assert scoring.scorers[0].pool is not None
    found = asyncio.run(scored(scoring, view({"state": {"place": 4}}, 0.5, 0.25)))
    assert (found.value, found.parts) == (5.5, {"steps": 0.75})
