"""An hour's standstill of a worker's event loop ends no branch, no tree and no score.  On a virtual clock."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rollout_fakes import PROMPT, Segment, make_world, ok
from safetensors import safe_open

from system.config import ChosenReward
from system.rollout.branching import Never
from system.rollout.reward import BranchView
from system.rollout.scorer import Scorer
from system.rollout.scoring import Scoring
from system.rollout.snapshot import freeze
from system.rollout.tree_rollout import TreeRollout
from system.tools.outcome import ToolOutcome
from system.tree.prompt import Prompt
from system.tree.record import Outcome
from system.twin.clock import run

HOUR = 3600.0
LIMITS = {"tree_deadline_s": 60.0, "branch_deadline_s": 50.0, "generate_deadline_s": 20.0}


def stand_still() -> None:
    loop: Any = asyncio.get_running_loop()
    loop._now += HOUR


@pytest.mark.parametrize("where", ["engine", "tool", "reward"])
def test_no_deadline_of_a_tree_counts_it(where: str) -> None:
    stood: list[str] = []

    def may_stand(here: str) -> None:
        if here == where and not stood:
            stood.append(here)
            asyncio.get_running_loop().call_later(0.3, stand_still)

    def script(text: str, rng: np.random.Generator) -> Segment:
        may_stand("engine")
        return Segment(" done" if "<result>" in text else "<search> a query </search>", first_s=1.0)

    def tool(name: str, arguments: Mapping[str, Any]) -> tuple[float, ToolOutcome]:
        may_stand("tool")
        return ok(seconds=1.0)

    class Slow:
        async def score(self, prompt: Prompt, branch: BranchView) -> float:
            may_stand("reward")
            await asyncio.sleep(1.0)
            return 1.0

    world = make_world(script, tool, policy=Never(4), leaves=4, roots=4, **LIMITS)
    scoring = Scoring([Scorer(Slow(), ChosenReward(name="slow", run="loop"))], close_deadline_s=10.0)
    tree = run(TreeRollout(replace(world.context, scoring=scoring), PROMPT, seed=1).run(), stands_still=True)
    assert stood == [where]
    assert tree.outcome.tolist() == [Outcome.STOPPED] * 4
    assert tree.reward.tolist() == [1.0] * 4


def test_none_of_it_is_spent_in_a_saved_tree(tmp_path: Any) -> None:
    world = make_world(lambda text, rng: Segment(" done", first_s=2 * HOUR), leaves=2, roots=2, **LIMITS)

    async def saved() -> bytes:
        tree = TreeRollout(world.context, PROMPT, seed=1)
        growing = asyncio.create_task(tree.run())
        await asyncio.sleep(4.0)
        stand_still()
        await asyncio.sleep(1.0)
        kept = freeze(tree)
        growing.cancel()
        return kept

    (tmp_path / "tree").write_bytes(run(saved(), stands_still=True))
    with safe_open(tmp_path / "tree", "numpy") as file:
        kept = json.loads(file.metadata()["tree"])
    spent = [kept["spent_s"], *(branch["spent_s"] for branch in kept["live"])]
    assert spent == pytest.approx([5.0] * 3, abs=0.3)
