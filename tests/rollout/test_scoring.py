"""Scoring: what a reward returns, what becomes of one that fails, and the processes it runs in."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rollout_fakes import PROMPT, Segment, make_world

from system.config import ChosenReward, Config, rewards
from system.config.schema import RolloutConfig, TaskConfig
from system.config.schema_reward import RewardConfig
from system.foreign import LET_GO_S
from system.rollout.failure import RolloutFailed
from system.rollout.reward import BranchView, Score, ScoreFailed
from system.rollout.rewards.arpo import ArpoReward
from system.rollout.score_pool import RewardBroken
from system.rollout.scorer import Scorer, normalised
from system.rollout.scoring import Scoring
from system.rollout.tree_rollout import TreeRollout
from system.tasks.base import make_task
from system.tree.prompt import Prompt
from system.tree.record import Kind, Mishap, Outcome, Tree
from system.tree.stats import TreeStats
from system.twin.clock import run

VIEW = BranchView(((Kind.MODEL, "word"),), Outcome.STOPPED)


@pytest.mark.parametrize(
    ("returned", "score"),
    [
        (Score(0.5, True, {"a": np.float32(1)}), Score(0.5, True, {"a": 1.0})),  # type: ignore[dict-item]
        (0.5, Score(0.5, False)),
        (1, Score(1.0, True)),
        (True, Score(1.0, True)),
        (np.float32(0.25), Score(0.25, False)),
        (np.array(1), Score(1.0, True)),
        (Score(np.float64(1), np.bool_(False)), Score(1.0, False)),  # type: ignore[arg-type]
    ],
)
def test_numbers_become_a_score_of_plain_floats(returned: Any, score: Score) -> None:
    made = normalised("mine", returned)
    assert made == score
    assert type(made.value) is float
    assert type(made.correct) is bool
    assert all(type(part) is float for part in made.parts.values())


@pytest.mark.parametrize(
    "returned",
    [None, math.nan, math.inf, -math.inf, "1", [1.0], 1j, np.array([1.0]), 10**400, 1e300,
     Score(math.nan, True), Score(1.0, np.array([1, 1])),
     Score(1.0, True, {"a": math.inf}), Score(1.0, True, None)],  # type: ignore[arg-type]
)  # fmt: skip
def test_what_is_no_finite_number_is_a_failed_score_that_names_the_reward(returned: Any) -> None:
    with pytest.raises(ScoreFailed, match="mine"):
        normalised("mine", returned)


class Late:
    async def score(self, prompt: Prompt, branch: BranchView) -> float:
        await asyncio.sleep(60)
        return 1.0


class Stubborn:
    async def score(self, prompt: Prompt, branch: BranchView) -> float:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(30)
        return 1.0


class Raising:
    def score(self, prompt: Prompt, branch: BranchView) -> float:
        raise KeyError("odd")


def scorer(reward: Any, deadline_s: float = 30.0, **chosen: Any) -> Scorer:
    """One that runs on the event loop, unless it is said where."""
    about: dict[str, Any] = {"name": type(reward).__name__, "run": "loop", "deadline_s": deadline_s, **chosen}
    return Scorer(reward, ChosenReward(**about))


async def scored(one: Scorer, prompt: Prompt = PROMPT, branch: BranchView = VIEW) -> Score:
    (score,) = await one.score(prompt, [branch])
    if isinstance(score, ScoreFailed):
        raise score
    return score


def pooled(config: Config) -> Scorer:
    """The configured reward, in its processes."""
    (chosen,) = rewards(config.reward)
    return Scorer.of(config, chosen)


def test_a_late_score_and_a_raising_reward_fail_one_leaf() -> None:
    with pytest.raises(ScoreFailed, match=r"reward Late: no score within reward.deadline_s=0.01 s") as late:
        asyncio.run(scored(scorer(Late(), 0.01)))
    assert late.value.reason == "deadline"
    with pytest.raises(ScoreFailed, match="reward Raising: KeyError: 'odd'") as raised:
        asyncio.run(scored(scorer(Raising())))
    assert raised.value.reason == "exception"


def test_a_reward_that_ignores_its_cancellation_is_late_all_the_same() -> None:
    async def play() -> float:
        with pytest.raises(ScoreFailed, match=r"reward Stubborn: no score within reward.deadline_s=2 s"):
            await scored(scorer(Stubborn(), 2))
        late = asyncio.get_running_loop().time()
        await asyncio.sleep(60)
        return late

    assert run(play()) == pytest.approx(2 + LET_GO_S)


class Raises:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def score(self, prompt: Prompt, branch: BranchView) -> float:
        raise self.error


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError("mine")])
def test_a_reward_that_would_end_the_process_or_the_task_fails_one_leaf(error: BaseException) -> None:
    with pytest.raises(ScoreFailed, match=f"reward Raises: {type(error).__name__}"):
        asyncio.run(scored(scorer(Raises(error))))


def test_an_error_may_quote_anything() -> None:
    """A model can make a reward quote half a character; what is said of it goes into logs."""
    with pytest.raises(ScoreFailed, match="ValueError: half \ufffd") as failed:
        asyncio.run(scored(scorer(Raises(ValueError("half \ud800")))))
    str(failed.value).encode()


def test_a_score_is_cancelled_with_its_tree() -> None:
    async def run() -> None:
        task = asyncio.create_task(scored(scorer(Late())))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_too_many_failures_are_an_error_with_the_reasons() -> None:
    scoring = Scoring([scorer(Raising())], failure_limit=0.2)
    for reason in ("deadline", "exception") * 10:
        scoring.count(ScoreFailed("reward Raising: odd", reason))
        scoring.count(None)
    said = r"21 of the last 41 .*\(exception 11, deadline 10\).*failure_limit=0.2 of 100: reward Raising: odd"
    with pytest.raises(RewardBroken, match=said):
        scoring.count(ScoreFailed("reward Raising: odd"))
    assert scoring.counters["reward/failed/exception"] == 11
    for _ in range(100):
        scoring.count(None)
    scoring.count(ScoreFailed("long ago is forgotten"))


def test_an_error_of_configuration_in_the_child_stops_by_name(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "once_only.py").write_text(
        "import os\nclass Once:\n    def __init__(self):\n"
        f"        os.close(os.open({str(tmp_path / 'made')!r}, os.O_CREAT | os.O_EXCL))\n"
        "    def score(self, prompt, branch):\n        return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = Config(reward=RewardConfig(name="once_only:Once"))
    with pytest.raises(RewardBroken, match=r"reward once_only:Once: its process does not start.*FileExists"):
        asyncio.run(scored(pooled(config)))


def test_a_pool_scores_confines_and_outlives_its_scorers(tmp_path: Path, monkeypatch: Any) -> None:
    """A scorer that writes, connects, starts a process, never returns, takes all memory, or ends itself."""
    (tmp_path / "hostile_scorer.py").write_text(
        "class Evaluates:\n    def score(self, prompt, branch):\n        return eval(branch.model_text)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SOME_API_KEY", "hunter2")
    config = Config(reward=RewardConfig(name="hostile_scorer:Evaluates", workers=1, memory_mb=256))
    one, written = pooled(config), tmp_path / "written"
    pool = one.pool
    assert pool is not None

    async def score(code: str) -> Score:
        return await scored(one, PROMPT, BranchView(((Kind.MODEL, code),), Outcome.STOPPED))

    async def refused(code: str, why: str) -> None:
        with pytest.raises(ScoreFailed, match=why):
            await score(code)

    async def run() -> None:
        assert await score("print('x') or 0.5") == Score(0.5, False)
        await refused(f"__import__('pathlib').Path({str(written)!r}).touch()", "PermissionError")
        await refused("__import__('socket').create_connection(('127.0.0.1', 9))", "PermissionError")
        await refused("__import__('os').fork()", "PermissionError")
        await refused("__import__('os').kill(__import__('os').getppid(), 9)", "PermissionError")
        await refused("len(bytes(1 << 32))", "reward.memory_mb")
        await refused("__import__('os')._exit(0)", "its process was lost")
        await refused("__import__('os').write(4, b'[' * 100_000 + b'\\n')", "its process was lost")
        await refused("__import__('os').environ['SOME_API_KEY']", "KeyError")
        pool.deadline_s = 0.3
        await refused("9**9**9", "no score within reward.deadline_s")
        await refused("__import__('math').factorial(10**7)", "no score within reward.deadline_s")
        pool.deadline_s = 30
        assert await score("1") == Score(1.0, True)
        await pool.close()

    asyncio.run(run())
    assert not written.exists()


def test_a_task_that_evaluates_answers_runs_confined(tmp_path: Path) -> None:
    config = Config(
        task=TaskConfig(name="reasoning-gym", dataset="countdown", train_size=4, eval_size=2),
        reward=RewardConfig(name="task", workers=1),
    )
    prompt, written, one = make_task(config).train()[0], tmp_path / "written", pooled(config)
    pool = one.pool
    assert pool is not None

    def said(answer: str) -> BranchView:
        text = f"<think></think><answer>\\boxed{{{answer}}}</answer>"
        return BranchView(((Kind.MODEL, text),), Outcome.STOPPED)

    async def run() -> None:
        right = await scored(one, prompt, said(prompt.answers[0]))
        assert right.correct
        try:
            paid = await scored(one, prompt, said(f"__import__('pathlib').Path({str(written)!r}).touch()"))
        except ScoreFailed:
            pass
        else:
            assert not paid.correct
        pool.deadline_s = 1.0
        with pytest.raises(ScoreFailed, match="no score within"):
            await scored(one, prompt, said("9**9**9"))
        await pool.close()

    asyncio.run(run())
    assert not written.exists()


class Odd:
    """Fails for the first ``failing`` leaves; waits as long as a judge would."""

    def __init__(self, failing: int) -> None:
        self.failing = failing

    async def score(self, prompt: Prompt, branch: BranchView) -> float:
        self.failing -= 1
        if self.failing >= 0:
            raise ValueError("odd answer")
        await asyncio.sleep(0.001)
        return 1.0


def _tree(failing: int, failure_limit: float = 1.0) -> Tree:
    world = make_world(
        lambda *_: Segment(" a b"), reward=Odd(failing), failure_limit=failure_limit, leaves=4, roots=4
    )
    return asyncio.run(TreeRollout(world.context, PROMPT, seed=1).run())


def test_a_failing_score_leaves_its_leaf_unscored_and_the_reason_in_the_tree() -> None:
    tree = _tree(failing=2)
    assert np.isnan(tree.reward).sum() == 2
    assert np.nansum(tree.reward) == 2.0
    assert [Mishap(*one) for one in tree.meta["mishaps"]] == [
        Mishap("reward", "reward Odd: ValueError: odd answer")
    ] * 2


def test_a_tree_with_too_few_scores_fails_for_the_reward() -> None:
    with pytest.raises(RolloutFailed, match="1 of 4 leaves scored; reward Odd: ValueError") as failure:
        _tree(failing=3)
    assert failure.value.reason == "reward"


def test_a_broken_reward_ends_the_tree_with_its_name() -> None:
    with pytest.raises(RewardBroken, match="reward Odd"):
        _tree(failing=4, failure_limit=0.0)


def test_what_needs_no_parser_is_scored_at_once_and_as_always() -> None:
    reward = ArpoReward()
    said = {
        "12": True, "-3.50": True, "Marie Curie": True, "12 km": False, r"\frac{1}{2}": False, "x-1": False,
        "9" * 40: False, "A": False, "a b c": False, "(2, 3)": False,
    }  # fmt: skip
    for answer, plain in said.items():
        prompt = Prompt("q", (), ("12",), "test")
        text = f"<think>.</think><answer>\\boxed{{{answer}}}</answer>"
        view = BranchView(((Kind.MODEL, text),), Outcome.STOPPED, ())
        quick = reward.quick(prompt, view)
        assert (quick is not None) == plain, answer
        assert quick in (None, reward.score(prompt, view))
        assert reward.quick(Prompt("q", (), ("12", r"\pi"), "test"), view) is None
    broken = BranchView(((Kind.MODEL, "no format"),), Outcome.STOPPED, ())
    assert reward.quick(Prompt("q", (), (r"\pi",), "test"), broken) == reward.score(prompt, broken)


def test_long_answers_cost_as_dapo_has_it() -> None:
    """The numbers of verl's DAPO reward manager: reward 1, limit 200, buffer 80."""
    expected = {100: 1, 120: 1.0, 140: 0.75, 160: 0.5, 200: 0.0, 230: -0.375}
    config = Config(
        rollout=RolloutConfig(max_response_tokens=200),
        reward=RewardConfig(overlong_buffer=80),
    )
    scoring = Scoring.of(config)
    for tokens, value in expected.items():
        score = scoring.total([Score(1.0, True)], replace(VIEW, tokens=tokens))
        assert score.value == pytest.approx(value)
        assert score.parts == ({} if value == 1 else {"overlong": pytest.approx(value - 1)})
        assert score.correct
    world = make_world(lambda *_: Segment("word"), leaves=2, roots=2)
    seen: list[int] = []
    world.context.scoring.overlong = lambda tokens: seen.append(tokens) or 0.0  # type: ignore[func-returns-value]
    tree = asyncio.run(TreeRollout(world.context, PROMPT, seed=1).run())
    assert sorted(seen) == sorted(TreeStats.of(tree).response_tokens.tolist())
