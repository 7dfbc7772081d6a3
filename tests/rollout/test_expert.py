"""Branches that begin with an expert's turns: what the engine is given, what the record and a reward see."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rollout_fakes import SPECS, Segment, World, make_world
from test_guided import ACTIONS, SHOWN, TEXT

from system.config import GuideConfig, load
from system.learn.credit.gain import gains
from system.observe.metrics import rollout_metrics
from system.plugins import SYNTAXES
from system.rollout.branching import Never, Policy, Random
from system.rollout.expert import prefixes, turns_of
from system.rollout.reward import BranchView, Score
from system.rollout.snapshot import freeze, thaw
from system.rollout.tree_rollout import TreeRollout
from system.tasks.quickstart.task import QuickstartTask
from system.tree.prompt import Prompt
from system.tree.record import Kind, Tree
from system.tree.stats import TreeStats
from system.twin.clock import run


class Sees:
    """A reward that keeps what it is shown."""

    def __init__(self) -> None:
        self.views: list[BranchView] = []

    def score(self, prompt: Prompt, branch: BranchView) -> Score:
        self.views.append(branch)
        return Score(float("Alda" in branch.text), True)


def answers(text: str, rng: np.random.Generator) -> Segment:
    return Segment("<answer> 12 </answer>")


def world(policy: Policy | None = None, share: float = 1.0, **config: Any) -> World:
    made = make_world(
        answers,
        policy=policy or Never(4),
        reward=Sees(),
        **{"leaves": 4, "roots": 4, "call_limit": 3} | config,
    )
    made.context = replace(made.context, guide=GuideConfig(expert=share, text=TEXT))
    return made


def grow(made: World, prompt: Prompt = SHOWN, **options: Any) -> Tree:
    return run(TreeRollout(made.context, prompt, **({"seed": 1} | options)).run())


def texts(made: World, tree: Tree, kind: Kind) -> list[str]:
    return [made.text(tree.tokens[tree.start[n] : tree.end[n]]) for n in np.flatnonzero(tree.kind == kind)]


def test_half_of_the_roots_go_on_from_the_experts_turns_which_stand_there_once() -> None:
    made = world()
    tree = grow(made)
    after = TreeStats.of(tree).after_expert
    assert (tree.n_leaves, after.sum()) == (4, 2)
    said = texts(made, tree, Kind.EXPERT)
    assert said == list(ACTIONS[: len(said)]) != []
    begun = [made.text(one.input_ids) for one in made.engine.requests]
    assert sorted(text == "who?" for text in begun) == [False, False, True, True]
    for text in begun:
        assert text == "who?" or text.startswith(f"who?{ACTIONS[0]}<result> Karkeep </result>")
    expert = np.repeat(tree.kind == Kind.EXPERT, tree.end - tree.start)
    assert (tree.version[expert] == -1).all()
    assert (tree.logprob[expert] == 0).all()
    assert not tree.calls, "nobody called a tool"
    assert not tree.guided


def test_a_reward_sees_the_experts_turns_and_calls_as_the_branchs_own() -> None:
    made = world()
    grow(made)
    seen = [view for view in made.context.scoring.scorers[0].reward.views if len(view.segments) > 1]
    assert len(seen) == 2
    for view in seen:
        assert view.segments[0] == (Kind.MODEL, ACTIONS[0])
        assert view.segments[1] == (Kind.TOOL, "<result> Karkeep </result>")
        assert view.tools[0] == ("search", "ok")
        assert view.segments[-1] == (Kind.MODEL, "<answer> 12 </answer>")


def test_the_policy_may_fork_where_the_expert_leaves_off() -> None:
    made = world(Random(4, 1.0), leaves=8, roots=2)
    tree = grow(made)
    assert tree.forks
    assert all(tree.kind[fork.node] == Kind.TOOL for fork in tree.forks)
    assert TreeStats.of(tree).after_expert.sum() > 1


def test_calls_and_tokens_of_the_expert_count_against_the_limits() -> None:
    for limits in ({"call_limit": 1}, {"max_response_tokens": 20}):
        made = world(**limits)
        assert texts(made, grow(made), Kind.EXPERT) == [ACTIONS[0]]
    made = world(max_response_tokens=8)
    assert texts(made, grow(made), Kind.EXPERT) == [], "there would be no room for an answer"


def test_a_branch_behind_the_expert_has_only_the_calls_that_the_expert_left() -> None:
    made = make_world(
        lambda text, rng: Segment("<search> q </search>"), policy=Never(4), leaves=4, roots=4, call_limit=3
    )
    made.context = replace(made.context, guide=GuideConfig(expert=1.0, text=TEXT))
    tree = grow(made)
    calls = [sum(tree.kind[node] == Kind.TOOL for node in TreeStats.of(tree).path(leaf)) for leaf in range(4)]
    assert calls == [3] * 4, "all call as often as they may"
    assert TreeStats.of(tree).after_expert.sum() == 2


@pytest.mark.parametrize("options", [{"share": 0.0}, {"greedy": True}, {"guide": 1}, {"bare": True}])
def test_where_no_expert_is_followed(options: dict[str, Any]) -> None:
    made = world(share=options.pop("share", 1.0))
    prompt = replace(SHOWN, demonstration=()) if options.pop("bare", False) else SHOWN
    tree = grow(made, prompt, **options)
    assert not TreeStats.of(tree).after_expert.any()
    assert not any(key.startswith("rollout/expert/") for key in rollout_metrics([TreeStats.of(tree)]))


def test_a_share_of_the_trees_is_drawn_by_their_seeds() -> None:
    drawn = [
        TreeStats.of(grow(world(share=0.5), seed=seed)).after_expert.any()
        for seed in range(40)
        for _ in range(2)
    ]
    assert drawn[::2] == drawn[1::2]
    assert 10 < sum(drawn[::2]) < 30


def test_what_led_branches_earn_is_told_beside_the_others() -> None:
    metrics = rollout_metrics([TreeStats.of(grow(world()))])
    told = {key: value for key, value in metrics.items() if "/expert/" in key}
    assert told == {
        "rollout/expert/trees": 1,
        "rollout/expert/leaves": 2,
        "rollout/expert/reward": 1,
        "rollout/expert/reward_beside": 0,
    }


def test_a_tree_with_an_experts_turns_goes_on_from_its_snapshot() -> None:
    made, whole = world(), world()

    async def interrupted() -> Tree:
        growing = TreeRollout(made.context, SHOWN, seed=1)
        task = asyncio.ensure_future(growing.run())
        await asyncio.sleep(0.2)
        data = freeze(growing)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return await thaw(made.context, SHOWN, data).run()

    tree, expected = run(interrupted()), grow(whole)
    assert texts(made, tree, Kind.EXPERT) == texts(whole, expected, Kind.EXPERT) != []
    assert TreeStats.of(tree).after_expert.sum() == 2


def test_the_gold_answer_is_scored_behind_the_experts_results_too() -> None:
    """So that a turn behind them has a gain, and the expert's own have."""
    tree = grow(world(call_limit=4, score_answer=True))
    known = np.isfinite(tree.answer_logprob)
    assert (known == ~np.isin(tree.kind, (Kind.MODEL, Kind.EXPERT))).all()
    experts = np.flatnonzero(tree.kind == Kind.EXPERT)
    behind = [node for node in range(tree.n_nodes) if tree.parent[node] in experts]
    assert experts.size
    assert np.isfinite(gains(TreeStats.of(tree))[behind]).all()


def test_turns_end_where_a_result_is_not_known() -> None:
    actions = (("model", "a"), ("tool", "b"), ("model", "c"), ("tool", ""), ("model", "d"), ("tool", "e"))
    assert turns_of(replace(SHOWN, demonstration=actions)) == (("a", "b"),)
    assert len(turns_of(SHOWN)) == 2


def test_a_raw_result_is_put_into_the_syntaxs_tags() -> None:
    raw = (("model", ACTIONS[0]), ("tool", "Karkeep"), ("model", "<answer> 12 </answer>"))
    made = world()
    tree = grow(made, replace(SHOWN, demonstration=raw))
    assert texts(made, tree, Kind.TOOL) == [made.context.syntax.render_result("Karkeep")]


def test_the_quickstarts_expert_is_followed_in_its_own_tokens() -> None:
    """What stands in the tree is what its demonstration says, none of it unknown to the tokenizer, and every
    call is one that the syntax reads.
    """
    config = load(None, ["guide.expert=1", "task.train_size=20", "task.eval_size=200"])
    task, made = QuickstartTask(config), world()
    tokenizer, syntax = task.tokenizer(), SYNTAXES.make("tags", {}, SPECS)
    made.context = replace(made.context, tokenizer=tokenizer, syntax=syntax, config=config.rollout)
    for prompt in task.train():
        growth = made.context.plant(prompt, 8)
        found = prefixes(made.context, growth, prompt, seed=1, roots=4)
        assert len(found) == 2
        for prefix in found:
            text = tokenizer.decode(growth.path_tokens(prefix.node).tolist())
            shown = "".join(text for _, text in prompt.demonstration[: len(prefix.segments)])
            assert text == prompt.messages[0]["content"] + shown
            assert "".join(text for _, text in prefix.segments) == shown
            assert {name for name, _ in prefix.tools} <= {"search", "python"}
            assert tokenizer.unk_token_id not in growth.path_tokens(prefix.node)
