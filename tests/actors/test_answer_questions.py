"""An evaluation whose questions fail: asked again, then wrong, told, and no reason to end a run."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from actors.evaluate import ATTEMPTS, ask_each
from system.config import Config, ConfigError, load
from system.evals.record import Answered, Asked
from system.evals.result import EvalResult
from system.rollout.failure import RolloutFailed
from system.rollout.score_pool import RewardBroken
from system.tree.builder import TreeBuilder
from system.tree.prompt import Prompt
from system.tree.record import Kind, Mishap, Origin, Outcome
from system.tree.stats import TreeStats

QUESTIONS = [Prompt(name, (), (), kind="calc") for name in ("good", "bad", "lost", "torn")]


def answered(prompt: Prompt) -> TreeStats:
    builder = TreeBuilder(prompt.id, prompt.kind, [1], 1)
    node = builder.node(0, Kind.MODEL)
    builder.extend(node, [3], [-1.0], None, 0)
    builder.leaf(node, Outcome.STOPPED, Origin.ROOT)
    builder.score(0, 1.0, True)
    builder.meta["mishaps"] = [Mishap("tool", "once")] if prompt.id == "torn" else []
    return TreeStats.of(builder.close(1.0))


class Worker:
    """A worker that never answers "bad", and answers "lost" once the engines are back."""

    def __init__(self, **fails: Exception) -> None:
        self.fails, self.asked, self.backs = fails, Counter[str](), list[str]()
        self.told: list[tuple[str, str]] = []
        self.shown = 0

    @property
    def answer(self) -> Any:
        async def reply(prompt: Prompt) -> TreeStats:
            self.asked[prompt.id] += 1
            if prompt.id in self.fails:
                raise self.fails[prompt.id]
            return answered(prompt)

        return SimpleNamespace(remote=lambda prompt, *_: reply(prompt))

    async def run(self, questions: list[Prompt], config: Config | None = None, of: str = "") -> EvalResult:
        async def back(cause: str) -> None:
            self.backs.append(cause)
            self.fails.pop("lost")

        def one_more(answer: Answered) -> None:
            self.shown += 1

        def told(kind: str, text: str) -> None:
            self.told.append((kind, text))

        pool: Any = SimpleNamespace(workers={"rollout-0": self})
        asked = [Asked("", question, 0, number) for number, question in enumerate(questions)]
        asked += [Asked(of, question, 0, 100 + i) for i, question in enumerate(questions)] if of else []
        return EvalResult.of(await ask_each(config or Config(), pool, asked, one_more, back, told))


async def test_a_question_that_fails_is_wrong_and_told() -> None:
    lost = RolloutFailed("lost", "engine lost", "connection refused")
    worker = Worker(bad=RolloutFailed("bad", "TypeError", "a bug"), lost=lost)
    result = await worker.run(QUESTIONS)
    assert worker.asked == {"good": 1, "bad": ATTEMPTS, "lost": 2, "torn": 1}
    assert worker.backs == ["connection refused"]
    assert (result.total.questions, result.total.accuracy, result.total.unscored) == (4, 0.75, 1)
    assert sorted(worker.told) == [
        ("question not answered", "tree of prompt 'bad': TypeError: a bug"),
        ("tool", "once"),
    ]
    assert worker.shown == 4


async def test_an_evaluation_without_a_single_answer_says_why() -> None:
    worker = Worker(bad=RolloutFailed("bad", "TypeError", "a bug"))
    with pytest.raises(RolloutFailed, match="a bug"):
        await worker.run([QUESTIONS[1]])


async def test_what_is_the_same_for_every_question_ends_it() -> None:
    worker = Worker(bad=ConfigError("no entropies"))
    with pytest.raises(ExceptionGroup, match="unhandled errors") as ended:
        await worker.run(QUESTIONS)
    assert isinstance(ended.value.exceptions[0], ConfigError)


async def test_a_sets_own_rewards_cost_that_set_alone() -> None:
    """Those of the run end it, as they would fail in training too."""
    config = load(None, ["eval.sets=[{name: a, path: x, reward: f1}, {name: b, path: x}]", "run.seed=1"])
    broken = RewardBroken("21 of the last 100 leaves could not be scored")

    class Judged(Worker):
        @property
        def answer(self) -> Any:
            async def reply(prompt: Prompt, of: str) -> TreeStats:
                self.asked[of] += 1
                if of in self.fails:
                    raise self.fails[of]
                return answered(prompt)

            return SimpleNamespace(remote=lambda prompt, seed, temperature, of: reply(prompt, of))

    config.rollout.concurrency = config.rollout.leaves = 1  # one after the other
    worker = Judged(a=broken)
    result = await worker.run(QUESTIONS, config, "a")
    assert (worker.asked[""], worker.asked["a"]) == (4, 1), "it is asked no further"
    assert (result.total.accuracy, result.sets["a"].total.unscored) == (1.0, 4)
    assert [one for one in worker.told if one[0] == "set not scored"] == [
        ("set not scored", "a is asked no further: 21 of the last 100 leaves could not be scored")
    ]
    assert worker.shown == 8
    with pytest.raises(ExceptionGroup):
        await Judged(b=broken).run(QUESTIONS, config, "b")
