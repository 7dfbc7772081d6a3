"""Equality of answers: judged pairs, and what holds for any two texts whatever a model writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from system.plugins import REWARDS
from system.rollout.reward import BranchView
from system.rollout.rewards.equality import equal
from system.tree.prompt import Prompt
from system.tree.record import Kind, Outcome

PAIRS = [
    (pair["answer"], pair["gold"], pair["right"])
    for pair in map(
        json.loads, (Path(__file__).parent / "answer_pairs.jsonl").read_text("utf-8").splitlines()
    )
]


@pytest.mark.parametrize(("answer", "gold", "right"), PAIRS)
def test_judged_pairs(answer: str, gold: str, right: bool) -> None:
    assert equal(answer, gold) is right
    assert equal(gold, answer) is right


@pytest.mark.parametrize(("answer", "gold", "right"), PAIRS)
def test_the_reward_pays_in_full_what_is_right_and_nothing_else(answer: str, gold: str, right: bool) -> None:
    text = f"<think> ok </think> <answer> \\boxed{{{answer}}} </answer>"
    branch = BranchView(((Kind.MODEL, text),), Outcome.STOPPED, ())
    score = REWARDS.make("arpo", {}).score(Prompt("p", ({"role": "user", "content": "?"},), (gold,)), branch)
    if text.count("{") == text.count("}") and "\\boxed{" not in answer:  # a box ends where its braces do
        assert score.correct is right
        assert (score.value == 1.0) is right


PIECES = re.findall(
    r"\S+",
    "0 1 2 7 10 12 100 999 0.5 .5 1,234 1,23 e i E x y n A B C ab km cm s m ° % $ + - * / ^ ** ! _ = < > "
    "| ( ) [ ] { } , ; : . ' \" & # ~ \\ \\\\ \\frac \\frac{1}{2} \\frac12 \\sqrt \\sqrt{2} \\sin \\ln "
    "\\log \\exp \\pi \\infty \\cup \\pm \\le \\ge \\in \\{ \\} \\left( \\right) \\cdot \\times "
    "\\binom{5}{2} \\text{ \\text{and} \\boxed{ \\% \\$ \\circ ^{ ^{2} ^{15} ^{99} _1 \\begin{pmatrix} "
    "\\end{pmatrix} & \\sum_{k=1}^{n} \\int \\lfloor \\rfloor ½ ² − π ≤ é が 狐 \ud83d or and the a Paris "
    "yes vitamin E2 -E1 .e5 e4 9^{9} 10^{23} 2020-05-01 v1.2 ",
)
TEXTS = st.lists(st.sampled_from([*PIECES, " ", "  "]), max_size=12).map("".join) | st.text(max_size=30)


@contextmanager
def in_two_seconds() -> Iterator[None]:
    """Of this process's time: another one may have had the core meanwhile."""
    began = time.process_time()
    yield
    assert time.process_time() - began < 2.0


@settings(max_examples=1500, derandomize=True, database=None)
@given(TEXTS, TEXTS)
def test_equality_holds_its_promises_for_any_two_texts(a: str, b: str) -> None:
    with in_two_seconds():
        assert equal(a, a)
        assert equal(a, b) is equal(b, a)
        assert equal(f" {a} ", a)  # white space around an answer is nothing


FORMS = ["{},{}", r"\{{{},{}\}}", "({},{})", "[{},{}]", "{}+{}", r"\begin{{pmatrix}}{}&{}\end{{pmatrix}}"]
SIGNED = st.sampled_from(
    [r"\sqrt{2}", "x^{2}", "(x+1)", "5", r"\frac{1}{3}", "3x", r"\ln x", "n!", "|x|", "y_1", r"\pi"]
)


@settings(max_examples=60, derandomize=True, database=None)
@given(SIGNED, SIGNED, st.sampled_from(FORMS))
def test_a_sign_is_never_lost(a: str, b: str, form: str) -> None:
    with in_two_seconds():
        assert equal(form.format(a, b), form.format(a, b).replace(",", " , "))
        assert not equal(form.format(a, b), form.format("-" + a, b))
        assert not equal(form.format(a, b), form.format(a, "-" + b).replace("+-", "-"))


HOSTILE = [
    "9^{9^{9^{9}}}",
    "((9^{99})^{99})^{99}",
    "200!!!",
    "(200!)!",
    "(99*99)!!",
    "2^{200!}",
    r"\binom{200}{\binom{200}{100}}",
    r"\exp(\exp(\exp(\exp(9))))",
    r"\exp(9^{99})",
    "9^{2100}",
    "99999^{2100}-99998^{2100}",
    "(x+y)^{200}",
    "x^{2100}",
    r"\sin(9^{2000})",
    r"\tan(\tan(\tan x))",
    "(" * 40 + "x" + ")" * 40,
    "[" * 40 + "1" + "]" * 40,
    "{" * 50 + "1" + "}" * 50,
    r"\{" * 20 + "1" + r"\}" * 20,
    "|" * 60,
    "|||x|||",
    "-" * 80 + "x",
    "x" + "+x" * 48,
    "1," * 400,
    r"\cup".join(["(1,2)"] * 100),
    r"\begin{pmatrix}" + "1&" * 300 + r"\end{pmatrix}",
    r"\text{" * 200,
    "<" * 500,
    "x=" * 300,
    "x<" * 30 + "x",
    "or" * 400,
    "/".join(["m"] * 200),
    "5 " + "m/" * 300,
    r"\frac{" * 40,
    r"\sqrt{" * 20 + "2" + "}" * 20,
    "1 " * 490,
    "½" * 900,
    "\\" * 999,
    r"\lfloor " * 7 + "x" + r"\rfloor" * 7,
    "n!" * 3,
    "n!^{n}",
    r"\log_{2}" * 8 + "x",
    "9" * 900,
    r"\boxed{" * 100 + "1" + "}" * 100,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_answers_are_decided_in_two_seconds(text: str) -> None:
    for other in ("1", "x+1", text + "+1", "(" + text + ",1)", "x=" + text):
        with in_two_seconds():
            assert equal(text, other) is equal(other, text)


@pytest.mark.parametrize("form", [r"\sin(x+{0})\cos(x+{0})", "((x+{0})(y+{0}))z", "1+[[x+{0}]]+[y+{0}]"])
@pytest.mark.parametrize("n", [9, 38])
def test_long_sets_are_decided_in_two_seconds(form: str, n: int) -> None:
    items = [form.format(i) for i in range(n)]
    with in_two_seconds():
        same = equal(
            "{" + ",".join(items) + "}", "{" + ",".join(f"{item}+0" for item in reversed(items)) + "}"
        )
    assert same is (n == 9)  # the longer is too long to be read


def test_a_worker_that_reads_no_formula_does_not_import_sympy() -> None:
    code = (
        "import sys; from system.rollout.rewards.equality import equal; assert equal('5 cm', '5');"
        "assert equal('The Who', 'who'); assert 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
