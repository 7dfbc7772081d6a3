"""What answers come to: by question, kind and set."""

from __future__ import annotations

import math

import pytest

from system.evals.record import Answered
from system.evals.result import EvalResult
from system.evals.table import in_line, markdown


def said(
    id: str, correct: bool | None, sample: int = 0, *, kind: str = "calc", set: str = "", **more: object
) -> Answered:
    about = {
        "reward": None if correct is None else float(correct),
        "tool_calls": 1,
        "tokens": 10,
        "text": "4",
    }
    return Answered(set, id, kind, sample, correct, outcome="stopped", **{**about, **more})  # type: ignore[arg-type]


def test_a_question_counts_once_however_often_it_is_asked() -> None:
    right = [said("a", True), said("b", False), said("c", None)]
    d = [said("d", True, 0), said("d", False, 1), said("d", None, 2)]
    result = EvalResult.of([*right[:2], said("c", None, kind="lookup"), *d])
    assert result.total.questions == 4
    assert result.total.accuracy == pytest.approx((1 + 0 + 0 + 1 / 3) / 4)
    assert result.kinds["calc"].accuracy == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert result.kinds["calc"].reward == pytest.approx((1 + 0 + 0.5) / 3)  # of those that have one
    assert result.total.unscored == 2
    assert result.metrics()["eval/lookup/accuracy"] == 0
    assert result.to_dict()["kinds"]["calc"]["questions"] == 3


def test_several_samples() -> None:
    text = ("4", "4", "5", "6")
    easy = [said("a", sample < 2, sample, text=text[sample]) for sample in range(4)]
    hard = [said("b", sample == 3, sample, text=("4", "4", "5", "6")[sample]) for sample in range(4)]
    scores = EvalResult.of([*easy, *hard]).total
    assert scores.samples == 4
    assert scores.accuracy == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert scores.pass_at[2] == pytest.approx(((1 - 1 / 6) + (1 - 3 / 6)) / 2)
    assert scores.pass_at[4] == 1
    assert scores.majority == 0.5
    assert scores.productivity == pytest.approx(3 / 8)
    metrics = EvalResult.of([*easy, *hard]).metrics()
    assert metrics["eval/pass@2"] == scores.pass_at[2]
    assert metrics["eval/majority"] == 0.5


def test_a_reward_has_an_interval_over_the_questions() -> None:
    """Student's t: of 0.2, 0.4 and 0.9 the mean is 0.5, the standard error 0.2082, t(2) = 4.303."""
    worth = [said("a", False, reward=0.2), said("b", False, reward=0.3), said("b", True, 1, reward=0.5)]
    result = EvalResult.of([*worth, said("c", True, reward=0.9), said("d", None)])
    scores = result.total
    assert (scores.reward, scores.reward_low, scores.reward_high) == (
        pytest.approx(0.5),
        pytest.approx(0.5 - 4.303 * 0.208167, abs=1e-4),
        pytest.approx(0.5 + 4.303 * 0.208167, abs=1e-4),
    )
    assert result.metrics()["eval/reward_low"] == scores.reward_low
    assert result.to_dict()["reward_high"] == scores.reward_high
    assert "| 0.500 (-0.396 to 1.396) |" in markdown(result)
    alone = EvalResult.of([said("a", True, reward=0.5)])
    assert "reward_low" not in alone.to_dict()
    assert "| 0.500 |" in markdown(alone)


def test_one_sample_has_no_majority() -> None:
    assert not {"eval/majority", "eval/samples"} & set(EvalResult.of([said("a", True)]).metrics())


def test_an_evaluation_of_nothing_is_not_a_number() -> None:
    assert math.isnan(EvalResult.of([]).total.accuracy)


def test_a_question_that_was_not_answered_counts_as_wrong() -> None:
    result = EvalResult.of(
        [said("a", True), Answered("", "b", "calc", 0), Answered("", "c", "lookup", 0)],
    )
    assert (result.total.questions, result.total.unscored) == (3, 2)
    assert result.total.accuracy == pytest.approx(1 / 3)
    assert result.total.reward == 1.0
    assert result.kinds["calc"].accuracy == 0.5
    assert math.isnan(result.kinds["lookup"].tool_calls)


def test_sets_are_told_apart() -> None:
    """Also where two have questions of the same name."""
    result = EvalResult.of([said("a", True), said("a", False, set="aime"), said("b", True, set="aime")])
    assert (result.total.questions, result.total.accuracy) == (1, 1)
    assert result.sets["aime"].total.accuracy == 0.5
    assert result.metrics()["eval/set/aime/accuracy"] == 0.5
    assert result.to_dict()["sets"]["aime"]["questions"] == 2
    assert in_line(result) == "1.000, aime 0.500"


def test_the_table() -> None:
    text = markdown(
        EvalResult.of([said("a", True), said("a", False, 1, set="x|y"), said("a", True, set="x|y")])
    )
    head, _, own, other, *_ = text.splitlines()
    assert head.startswith("| set | questions | n | avg@n | pass@2 | maj@n |")
    assert own.startswith("| held-out | 1 | 1 | 100.0% (20.7% to 100.0%) | – | – | 1.000 | ")
    assert other.startswith("| x\\|y | 1 | 2 | 50.0% (")
    assert [line.count(" | ") for line in (head, own, other)] == [9, 9, 9]
