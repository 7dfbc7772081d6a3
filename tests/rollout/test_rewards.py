"""Reward rules: the released code's executed vectors, and the mended rule."""

from __future__ import annotations

import time

import pytest

from system.plugins import REWARDS
from system.rollout.reward import BranchView, Score
from system.rollout.rewards.equality import equal, is_mathematical, parse_number
from system.rollout.words import last_boxed, normalize, token_f1
from system.tree.prompt import Prompt
from system.tree.record import Kind, Outcome

OK = " <think> ok </think>"
SEARCH = "<think> hm </think> <search> q </search>"
PYTHON = "<think> hm </think> <python> print(1) </python>"


def prompt(*golds: str) -> Prompt:
    return Prompt("p", ({"role": "user", "content": "?"},), golds)


def answer(text: str) -> str:
    return f"{OK} <answer> \\boxed{{{text}}} </answer>"


def view(*texts: str, tools: tuple[tuple[str, str], ...] = ()) -> BranchView:
    """Model and tool texts in turn; tool texts get their tags."""
    segments = tuple(
        (Kind.MODEL, text) if i % 2 == 0 else (Kind.TOOL, f" <result>\n{text}\n</result>")
        for i, text in enumerate(texts)
    )
    return BranchView(segments, Outcome.STOPPED, tools)


def release(branch: BranchView, *golds: str) -> Score:
    return REWARDS.make("arpo-release", {}).score(prompt(*golds), branch)


def mended(branch: BranchView, *golds: str) -> Score:
    return REWARDS.make("arpo", {}).score(prompt(*golds), branch)


BOTH = (("search", "ok"), ("python", "ok"))


def with_both(text: str) -> BranchView:
    return view(SEARCH, "found", PYTHON, "1", answer(text), tools=BOTH)


RELEASED_VECTORS = [  # (branch, gold, the released code's score)
    (view(answer("42")), "42", 1.0),
    (with_both("42"), "42", 1.1),
    (with_both("New York City"), "New York", 0.9),
    (view(answer("Paris")), "Rome", 0.0),
    (view("<answer> \\boxed{42} </answer>"), "42", -1.0),  # no think
    (view(answer("42") + " <answer> \\boxed{42} </answer>"), "42", -1.0),  # two answers
    (view(f"{OK} <answer> 42 </answer>"), "42", -1.0),  # no boxed
    (view(f"<search> q </search> {answer('42')}"), "42", -1.0),  # search without result
    (view(SEARCH, "see <answer> here", answer("42")), "42", -1.0),  # "<answer>" inside a tool result
    (view(answer("-5")), "5", 1.0),
    (view(answer("1/2")), "12", 1.0),
    (view(answer(r"\frac{1}{2}")), "0.5", 0.0),
    (view(answer("9.8")), "9.80", 0.0),
    (view(answer(r"3\sqrt{3}-6")), r"3\sqrt{3} - 6", 0.0),
    (view("<think> </search></python> </think> <answer> \\boxed{42} </answer>"), "42", 1.1),
]


@pytest.mark.parametrize(("branch", "gold", "score"), RELEASED_VECTORS)
def test_released_vectors(branch: BranchView, gold: str, score: float) -> None:
    assert release(branch, gold).value == pytest.approx(score)


@pytest.mark.parametrize(
    "text",
    [
        "<think> a <answer> \\boxed{42} </answer>",  # think never closed
        f"{OK} </answer> <answer> \\boxed{{42}}",  # closed before opened
        f"{OK} <answer> \\boxed{{42 </answer>",  # boxed never closed
        f"{OK} \\boxed{{42}} <answer> </answer>",  # boxed outside
    ],
)
def test_format_errors_of_both_rules(text: str) -> None:
    assert release(view(text), "42") == Score(-1.0, False, {"format": 0.0})
    assert mended(view(text), "42") == Score(-1.0, False, {"format": 0.0})


def test_release_takes_the_best_gold_and_yes_no_exactly() -> None:
    assert release(view(answer("the Big Apple")), "New York", "big apple!").value == 1.0
    assert release(view(answer("yes")), "yes, it is").value == 0.0
    assert release(view(answer("yes it is")), "yes").value == 0.0
    assert release(view(answer("Yes.")), "yes").value == 1.0


MENDED_VECTORS = [  # (branch, gold, score, correct)
    (view(answer("42")), "42", 1.0, True),
    (view(answer(" 42 ")), "42", 1.0, True),
    (with_both("42"), "42", 1.1, True),
    (with_both("New York City"), "New York", 0.9, False),
    (view(answer("Paris")), "Rome", 0.0, False),
    (with_both("Paris"), "Rome", 0.0, False),
    (view(SEARCH, "see <answer> here </think>", answer("42"), tools=(("search", "ok"),)), "42", 1.0, True),
    (view(answer("-5")), "5", 0.0, False),
    (view(answer("1/2")), "12", 0.0, False),
    (view(answer(r"\frac{1}{2}")), "0.5", 1.0, True),
    (view(answer("9.8")), "9.80", 1.0, True),
    (view(answer(r"3\sqrt{3}-6")), r"3\sqrt{3} - 6", 1.0, True),
    (view(answer(r"-6+3\sqrt{3}")), r"3\sqrt{3} - 6", 1.0, True),
    (view(answer(r"3\sqrt{2}-6")), r"3\sqrt{3} - 6", 0.0, False),
    (view("<think> </search></python> </think> <answer> \\boxed{42} </answer>"), "42", 1.0, True),
    (view(answer("-5 km")), "5 km", 0.5, False),
    (view(answer("The  New-York")), "new york", 0.0, False),
    (view(answer("Alda Rossi")), "alda rossi.", 1.0, True),
]


@pytest.mark.parametrize(("branch", "gold", "score", "correct"), MENDED_VECTORS)
def test_mended_vectors(branch: BranchView, gold: str, score: float, correct: bool) -> None:
    got = mended(branch, gold)
    assert got.value == pytest.approx(score)
    assert got.correct is correct


@pytest.mark.parametrize(
    "tools",
    [
        (),
        (("search", "ok"),),
        (("search", "ok"), ("search", "ok")),
        (("search", "ok"), ("python", "error")),
        (("search", "timeout"), ("python", "ok")),
        (("search", "ok"), ("", "rejected")),
    ],
)
def test_no_bonus_without_two_tools_that_worked(tools: tuple[tuple[str, str], ...]) -> None:
    assert mended(view(SEARCH, "found", PYTHON, "1", answer("42"), tools=tools), "42").value == 1.0


@pytest.mark.parametrize(
    "branch",
    [
        view(f"<think> a </think> <search> q </search> {answer('42')}"),  # called and answered itself
        view(f"{SEARCH} <result> made up </result> {answer('42')}"),  # wrote the result itself
        view(answer("42") + " <search> q </search>"),  # a call too many: no result came
        view("<think> x </think> <search> never closed", "r", answer("42")),
    ],
)
def test_calls_without_results_break_the_format(branch: BranchView) -> None:
    assert mended(branch, "42").value == -1.0


def test_correct_is_equality_and_best_over_golds() -> None:
    assert mended(view(answer("the Big Apple")), "New York", "big apple!") == Score(
        1.0, True, {"format": 1.0, "answer": 1.0, "bonus": 0.0}
    )
    assert not mended(view(answer("York New")), "New York").correct
    assert mended(view(answer("anything"))).value == 0.0  # no gold at all


EQUAL = [
    ("0.5", r"\frac{1}{2}"), (r"\frac12", "1/2"), (r"-\frac{1}{2}", "-0.5"), (r"\dfrac{3}{4}", "0.75"),
    ("1,234", "1234"), ("1e3", "1000"), ("50%", "0.5"), (r"50\%", "50"), ("$5", "5"), (r"\$5", "5"),
    ("5.", "5"),
    ("42.0", "42"), ("0.333333", "1/3"), ("0.30000000000000004", "0.3"), ("+7", "7"), ("x=5", "5"),
    ("(1,2)", "(1, 2)"), (r"\frac{\pi}{2}", r"\pi/2"), ("2^{10}", "1024"), (r"90^\circ", "90"),
    ("2x+1", "1+2x"), ("x^2-1", "(x-1)(x+1)"), (r"\text{ 5 }", "5"),
]  # fmt: skip
UNEQUAL = [
    ("-5", "5"), ("1/2", "12"), ("9.8", "98"), ("1000000", "1000001"), ("1234567.5", "1234568.5"),
    ("0.33", "1/3"),
    ("1e-7", "2e-7"), ("2x+1", "2x-1"), (r"\sqrt{2}", "1.5"), ("(1,2)", "(2,1)"), ("2^{10}", "1025"),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_equal_answers(a: str, b: str) -> None:
    assert is_mathematical(a)
    assert is_mathematical(b)
    assert equal(a, b)
    assert equal(b, a) or "=" in a  # an equation may be answered by its right side, not the other way round


@pytest.mark.parametrize(("a", "b"), UNEQUAL)
def test_unequal_answers(a: str, b: str) -> None:
    assert not equal(a, b)
    assert not equal(b, a)


@pytest.mark.parametrize(
    "words",
    ["", "New York", "12:30", "2020-05-01", "1990-1995", "3 4", "B12", "C++", "5 km", "A", "1/0", "v1.2.3"],
)
def test_words_are_not_mathematical(words: str) -> None:
    assert not is_mathematical(words)


@pytest.mark.parametrize(
    "hostile",
    [
        "9^{9^{9^{9}}}", "9**9**9**9", "((9^{99})^{99})^{99}", "9^{9*9*9*9*9}", "99999999!",
        r"\binom{999999}{99999}",
        r"\sum_{i=1}^{99999999} i", r"\prod_{i=1}^{9999} i^i", "(a+b+c+d+f)^{50}", "(" * 60 + "x" + ")" * 60,
        "1e999999999", "9" * 100_000, r"\frac{9^{999999}}{7^{999999}}", r"\sqrt{" * 30 + "2" + "}" * 30,
        r"10^{10^{10}}", "2^{2^{2^{2^{2^{2}}}}}", r"\int_0^1 e^{x^2} dx", "(x+y)^{-99}(x-y)^{99}",
        "{" * 80, "\\" * 80, "^" * 80, "1" + "/1" * 39,
    ],
)  # fmt: skip
def test_hostile_answers_come_back_at_once(hostile: str) -> None:
    began = time.process_time()
    mended(view(answer(hostile)), "1")
    mended(view(answer(hostile)), r"\sqrt{2}+1")
    assert time.process_time() - began < 5.0  # unguarded, these run for minutes or for ever


def test_numbers_are_exact() -> None:
    assert parse_number(r"-\frac{3}{6}") == parse_number("-0.5") == -parse_number("1/2")  # type: ignore[operator]
    assert parse_number("12 34") is None
    assert parse_number("1,23") is None
    assert parse_number("--5") is None


def test_words() -> None:
    assert normalize("The  Quick, (brown) fox!") == "quick brown fox"
    assert token_f1("a b c", "b c d") == pytest.approx(4 / 5)  # articles go: {b, c} and {b, c, d}
    assert last_boxed(r"\boxed{1} then \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{1") is None
    assert last_boxed("none") is None


def test_unknown_reward() -> None:
    with pytest.raises(ValueError, match=r"reward\.name='vibes': choose one of arpo"):
        REWARDS.make("vibes", {})
