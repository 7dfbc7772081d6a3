"""Several weighted rewards, group-wise ones, and the places where they run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rollout_fakes import PROMPT, Segment, make_world

from system.config import ChosenReward, Config, ConfigError, from_dict, load, rewards, to_dict
from system.config.check import part_problems
from system.observe.metrics import reward_metrics, reward_totals
from system.rollout.failure import RolloutFailed
from system.rollout.reward import BranchView, Score, ScoreFailed
from system.rollout.score_pool import RewardBroken
from system.rollout.scorer import Scorer
from system.rollout.scoring import Scoring
from system.rollout.tree_rollout import TreeRollout
from system.tree.prompt import Prompt
from system.tree.record import Kind, Mishap, Outcome, Tree
from system.tree.stats import TreeStats
from system.twin.clock import run

VIEW = BranchView(((Kind.MODEL, "word"),), Outcome.STOPPED)


class Length:
    measured = ("words",)

    async def score(self, prompt: Prompt, branch: BranchView) -> Score:
        words = float(len(branch.model_text.split()))
        return Score(words, words > 1, {"words": words, "not a metric": 0.0})


class Rank:
    """Of a tree's leaves, by length: 0, 1, …"""

    async def score_group(self, prompt: Prompt, branches: Sequence[BranchView]) -> list[float]:
        lengths = [len(branch.model_text) for branch in branches]
        return [float(sorted(lengths).index(length)) for length in lengths]


class Fails:
    async def score(self, prompt: Prompt, branch: BranchView) -> float:
        raise ValueError("out of order")


class GroupThat:
    def __init__(self, returns: Any) -> None:
        self.returns = returns

    async def score_group(self, prompt: Prompt, branches: Sequence[BranchView]) -> Any:
        if isinstance(self.returns, Exception):
            raise self.returns
        return self.returns


class Slow:
    async def score(self, prompt: Prompt, branch: BranchView) -> float:
        await asyncio.sleep(50)
        return 1.0


def on_loop(reward: Any, label: str = "", weight: float = 1.0, **more: Any) -> Scorer:
    about: dict[str, Any] = {"name": type(reward).__name__, "label": label, "weight": weight, "run": "loop"}
    return Scorer(reward, ChosenReward(**about, **more))


def grown(*scorers: Scorer, leaves: int = 3, **about: Any) -> Tree:
    """A tree of branches with 1, 2, 3 … words, in virtual time."""
    count = iter(range(1, 100))
    world = make_world(lambda *_: Segment(" a" * next(count)), leaves=leaves, roots=leaves)
    context = replace(world.context, scoring=Scoring(scorers, **about))
    return run(TreeRollout(context, PROMPT, seed=1).run())


def test_a_leaf_is_worth_the_weighted_sum_and_its_parts_are_kept_and_measured() -> None:
    tree = grown(on_loop(Length(), "length", 2.0), on_loop(Rank(), "rank", -0.5))
    assert tree.reward.tolist() == [2.0, 3.5, 5.0]
    assert tree.correct.tolist() == [0, 1, 1]  # as the first says
    assert tree.meta["parts"][1] == {
        "length": 2.0, "length/words": 2.0, "length/not a metric": 0.0, "rank": 1.0,
    }  # fmt: skip
    assert tree.meta["measured"] == ["length", "length/words", "rank", "overlong"]
    assert reward_metrics([TreeStats.of(tree)]) == {
        "reward/length": 2.0, "reward/length/words": 2.0, "reward/rank": 1.0,
    }  # fmt: skip


def test_one_that_fails_leaves_the_leaf_unscored_and_the_others_numbers_in_the_record() -> None:
    with pytest.raises(RolloutFailed, match="0 of 3 leaves scored; reward fails: ValueError: out of order"):
        grown(on_loop(Length(), "length"), on_loop(Fails(), "fails"))
    tree = grown(on_loop(Length(), "length"), on_loop(GroupThat([1.0, None, 2.0]), "group"))
    assert np.isnan(tree.reward).tolist() == [False, True, False]
    assert tree.meta["parts"][1] == {"length": 2.0, "length/words": 2.0, "length/not a metric": 0.0}
    assert tree.meta["unscored"] == {"1": "reward group returned None: a finite number or a Score is needed"}
    assert [Mishap(*one).kind for one in tree.meta["mishaps"]] == ["reward"]


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ([1.0, 2.0], "3 scores are needed"),
        (7, "3 scores are needed"),
        ([float("nan")] * 3, "returned nan"),
        (KeyError("odd"), "KeyError: 'odd'"),
    ],
)
def test_a_group_that_fails_is_a_tree_that_fails_and_counts_every_leaf(returned: Any, says: str) -> None:
    with pytest.raises(RolloutFailed, match=says) as failed:
        grown(on_loop(GroupThat(returned), "group"))
    assert failed.value.reason == "reward"
    with pytest.raises(RewardBroken, match=f"3 of the last 3 leaves could not be scored .*{says}"):
        grown(on_loop(GroupThat(returned), "group"), failure_limit=0.02)


def test_a_reward_may_be_one_without_which_there_is_no_going_on() -> None:
    with pytest.raises(RewardBroken, match="on_failure=stop, and exception: reward fails: ValueError"):
        grown(on_loop(Fails(), "fails", on_failure="stop"))


def test_a_tree_does_not_wait_for_ever() -> None:
    with pytest.raises(
        RolloutFailed, match=r"no score within reward.close_deadline_s=10 s of the tree's end"
    ):
        grown(on_loop(Slow(), deadline_s=100.0), close_deadline_s=10.0)
    tree = grown(on_loop(Slow(), deadline_s=100.0), close_deadline_s=60.0)
    assert tree.reward.tolist() == [1.0] * 3


def test_more_than_may_run_at_once_wait_and_are_not_late() -> None:
    tree = grown(on_loop(Slow(), concurrency=1, deadline_s=55.0), close_deadline_s=200.0)
    assert tree.reward.tolist() == [1.0] * 3


# Where they run


class InAThread:
    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.go = threading.Event()

    def score(self, prompt: Prompt, branch: BranchView) -> float:
        self.seen.add(threading.current_thread().name)
        if branch.model_text == "stuck":
            self.go.wait()
        if branch.model_text == "odd":
            raise StopIteration
        return 0.5


async def test_a_thread_does_not_hold_up_the_loop_and_one_that_is_stuck_keeps_its_place() -> None:
    reward = InAThread()
    chosen = ChosenReward(name="mine", run="thread", concurrency=2)
    scorer = Scorer(reward, chosen)
    stuck, odd = (BranchView(((Kind.MODEL, text),), Outcome.STOPPED) for text in ("stuck", "odd"))

    async def late() -> None:
        scorer.chosen = replace(chosen, deadline_s=0.2)
        with pytest.raises(ScoreFailed, match="no score within"):
            await scorer.score(PROMPT, [stuck])
        scorer.chosen = chosen

    await late()  # on the loop, which finds it late
    assert await scorer.score(PROMPT, [VIEW]) == [Score(0.5, False)]
    with pytest.raises(ScoreFailed, match="StopIteration"):
        await scorer.score(PROMPT, [odd])
    await late()
    waiting = asyncio.create_task(scorer.score(PROMPT, [VIEW]))
    await asyncio.sleep(0.3)
    assert not waiting.done()  # both places are taken
    reward.go.set()
    assert await waiting == [Score(0.5, False)]
    assert reward.seen == {"reward"}


@pytest.fixture
def scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "given_scorers.py").write_text(
        "class Loops:\n"
        "    def score(self, prompt, branch):\n"
        "        while branch.model_text == 'loop': pass\n"
        "        return 0.5\n"
        "class Compares:\n"
        "    def score_group(self, prompt, branches):\n"
        "        best = max(len(one.model_text) for one in branches)\n"
        "        return [None if b.model_text == 'odd' else len(b.model_text) / best for b in branches]\n"
        "class Waits:\n"
        "    async def score(self, prompt, branch):\n"
        "        return 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def made(*parts: Any) -> list[Scorer]:
    config = Config()
    config.reward.name, config.reward.parts = "", [*parts]
    return [Scorer.of(config, one) for one in rewards(config.reward)]


@pytest.mark.usefixtures("scorers")
async def test_a_process_that_loops_for_ever_is_killed_alone() -> None:
    (scorer,) = made({"name": "given_scorers:Loops", "deadline_s": 3.0, "concurrency": 2})
    assert await scorer.score(PROMPT, [VIEW]) == [Score(0.5, False)]
    looping = BranchView(((Kind.MODEL, "loop"),), Outcome.STOPPED)
    late = asyncio.create_task(scorer.score(PROMPT, [looping]))
    await asyncio.sleep(0.1)
    assert await scorer.score(PROMPT, [VIEW]) == [Score(0.5, False)]  # in the other, meanwhile
    with pytest.raises(ScoreFailed, match=r"reward Loops: no score within reward.parts.0..deadline_s=3 s"):
        await late
    assert await scorer.score(PROMPT, [VIEW]) == [Score(0.5, False)]
    await scorer.close()


@pytest.mark.usefixtures("scorers")
async def test_a_group_is_compared_in_a_process_and_each_reward_has_its_own() -> None:
    compares, arpo = made({"name": "given_scorers:Compares"}, {"name": "arpo"})
    views = [BranchView(((Kind.MODEL, text),), Outcome.STOPPED) for text in ("abcd", "ab", "odd")]
    best, other, odd = await compares.score(PROMPT, views)
    assert (best, other) == (Score(1.0, True), Score(0.5, False))
    assert isinstance(odd, ScoreFailed)
    assert odd.reason == "number"
    formula = "<think></think><answer>\\boxed{\\frac{1}{2}}</answer>"
    (score,) = await arpo.score(
        Prompt("q", (), ("0.5",)), [BranchView(((Kind.MODEL, formula),), Outcome.STOPPED)]
    )
    assert isinstance(score, Score)
    assert score.correct
    for one in (compares, arpo):
        await one.close()


@pytest.mark.usefixtures("scorers")
def test_what_would_hold_up_the_loop_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parts\[0\].run=loop: given_scorers:Loops is no `async"):
        made({"name": "given_scorers:Loops", "run": "loop"})
    for run_in in ("thread", "process"):
        with pytest.raises(ConfigError, match=rf"run={run_in}: given_scorers:Waits is an `async def`"):
            made({"name": "given_scorers:Waits", "run": run_in})


# The configuration


def chosen(*words: str) -> list[ChosenReward]:
    return rewards(load(None, words).reward)


def test_one_reward_is_as_it_was() -> None:
    for words in ((), ("reward=arpo",), ("reward.name=arpo", "reward.deadline_s=3")):
        (one,) = chosen(*words)
        assert (one.name, one.label, one.weight) == ("arpo", "", 1.0)
    assert one.deadline_s == 3


def test_a_list_is_several_and_what_a_part_leaves_out_the_section_says(tmp_path: Path) -> None:
    both = "reward=[arpo, {name: arpo-release, weight: '0.5', deadline_s: 9, label: old, options: {}}]"
    first, second = chosen("reward.deadline_s=5", "reward.options={x: 1}", both)
    assert (first.name, first.label, first.deadline_s, first.options) == ("arpo", "arpo", 5.0, {})
    assert (second.label, second.weight, second.deadline_s) == ("old", 0.5, 9.0)
    config = load(None, [both])
    assert from_dict(to_dict(config)) == config
    (tmp_path / "base.yaml").write_text("reward:\n  - arpo\n  - {name: arpo-release, weight: 2}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nreward: {failure_limit: 0.5}\n")
    assert len(rewards(load(tmp_path / "mine.yaml").reward)) == 2
    assert chosen(both, "reward=arpo-release")[0].name == "arpo-release"  # who comes last
    assert len(chosen(both, "reward.name=arpo-release")) == 1
    assert len(chosen("reward=arpo", both)) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("reward=[{nmae: arpo}]", r"reward.parts\[0\].nmae: a reward has name, .*did you mean name\?"),
        ("reward=[{weight: 1}]", r"reward.parts\[0\].name is missing"),
        ("reward=[{name: apro}]", r"reward.parts\[0\].name='apro': choose one of .*did you mean arpo\?"),
        ("reward=[arpo, arpo]", r"label: two rewards are called 'arpo'"),
        ("reward=[{name: arpo, weight: heavy}]", r"reward.parts\[0\].weight='heavy' must be a number"),
        ("reward=[{name: arpo, weight: .inf}]", r"reward.parts\[0\].weight=inf must be a finite number"),
        ("reward=[{name: arpo, deadline_s: 0}]", r"reward.parts\[0\].deadline_s=0.0 must be above 0"),
        ("reward=[{name: arpo, run: gpu}]", r"reward.parts\[0\].run='gpu': choose one of auto"),
        ("reward=[{name: arpo, on_failure: zero}]", "choose one of unscored, stop"),
        ("reward=[{name: arpo, options: [1]}]", r"reward.parts\[0\].options=\[1\] must be a dictionary"),
        ("reward=[{name: arpo, weight: 0}]", "every weight is 0"),
        ("reward={name: arpo, parts: [arpo-release]}", "beside reward.parts"),
        ("reward.name=", "write `reward:"),
        (
            "reward={name: judge, options: {base_url: 'http://j', model: m, rate_per_s: 1}}",
            r"reward.options.rate_per_s=1: with 256 scores at once .*reward.concurrency",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(words: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(None, [words])


def test_options_are_checked_where_they_stand() -> None:
    config = load(None, ["reward=[arpo, {name: arpo-release, options: {bonus: 1}}]"])
    assert any("reward.parts[1].options.bonus: arpo-release has no such option" in one
               for one in part_problems(config))  # fmt: skip


def test_a_judges_figures() -> None:
    counts = {"reward/judge/answers": 4.0, "reward/judge/answer_s": 6.0, "reward/judge/requests": 5.0,
              "reward/judge/cache_hits": 4.0, "reward/judge/joins": 1.0}  # fmt: skip
    assert reward_totals(counts) == counts | {"reward/judge/latency_s": 1.5, "reward/judge/cache_share": 0.5}
