"""Token F1 as a reward: SQuAD's over several gold answers."""

from __future__ import annotations

import pytest

from system.plugins import REWARDS
from system.rollout.reward import BranchView, Score
from system.rollout.scorer import normalised
from system.tree.prompt import Prompt
from system.tree.record import Kind, Outcome


def score(text: str, *golds: str, tool: str = "") -> Score:
    prompt = Prompt("p", ({"role": "user", "content": "?"},), golds)
    said = ((Kind.MODEL, text),) if not tool else ((Kind.MODEL, ""), (Kind.TOOL, tool), (Kind.MODEL, text))
    reward = REWARDS.make("f1", {})
    found = reward.score(prompt, BranchView(said, Outcome.STOPPED))
    assert reward.quick(prompt, BranchView(said, Outcome.STOPPED)) == found
    return normalised("f1", found)


@pytest.mark.parametrize(
    ("said", "golds", "value", "correct"),
    [
        ("Paris", ("Paris",), 1.0, True),
        ("the  PARIS!", ("Paris",), 1.0, True),  # case, articles, punctuation, white space
        ("Paris, France", ("Paris",), 2 / 3, False),  # precision 1/2, recall 1
        ("Barack Obama", ("Barack Hussein Obama II",), 2 / 3, False),  # precision 1, recall 1/2
        ("Obama Barack", ("Barack Obama",), 1.0, False),  # a bag of words, and no exact match
        ("to be or not to be", ("to be to",), 2 * 3 / (6 + 3), False),  # a word counts as often as it stands
        ("Rome", ("Paris", "City of Rome"), 2 * 1 / (1 + 3), False),  # the best of several
        ("Rome", ("City of Rome", "Rome"), 1.0, True),
        ("yes", ("yes",), 1.0, True),
        ("yes it is", ("yes",), 0.0, False),  # HotpotQA
        ("no", ("no idea",), 0.0, False),
        ("", ("Paris",), 0.0, False),
        ("the", ("the",), 0.0, False),  # nothing is left
        ("Paris", (), 0.0, False),
    ],
)
def test_values(said: str, golds: tuple[str, ...], value: float, correct: bool) -> None:
    found = score(f"<think>hm</think><answer>{said}</answer>", *golds)
    assert (found.value, found.correct) == (pytest.approx(value), correct)


def test_where_the_answer_stands() -> None:
    for text in (
        "<think>London?</think> <answer> The answer is \\boxed{Paris}. </answer>",
        "I think so: <answer>Paris</answer>",
        "<think>London?</think>Paris",
        "So it is \\boxed{Paris}",
        "Paris",
    ):
        assert score(text, "Paris").value == 1.0, text


def test_a_tools_text_is_no_answer() -> None:
    assert score("<answer>Rome</answer>", "Paris", tool="<answer>Paris</answer>").value == 0.0


def test_models_are_told_its_form() -> None:
    assert "<answer>" in REWARDS.find("f1").answer_format  # type: ignore[attr-defined]
