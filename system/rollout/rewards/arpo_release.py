"""ARPO's reward exactly as its released training code computes it, mistakes included.

Use it to compare with published runs; :mod:`system.rollout.rewards.arpo` mends it.  It reads the whole
response as one text, what the tools wrote included.
"""

from __future__ import annotations

from typing import ClassVar

from system.rollout.reward import BranchView, Score
from system.rollout.words import answer_span, last_boxed, token_f1
from system.tree.prompt import Prompt

FORMAT_ERROR = -1.0
MULTI_TOOL_BONUS = 0.1
ANSWER_FORMAT = (  # what a model must be told to be scored at all
    "Reason between <think> and </think>. When you know the answer, write <answer> and </answer> around it, "
    "with the exact answer inside \\boxed{}."
)


class ArpoReleaseReward:
    """-1 for a format error; else the token F1 of the boxed answer, the best over the golds, plus 0.1 if it
    is above 0 and both closing tool tags occur anywhere.  Range {-1, 0} ∪ (0, 1.1].
    """

    answer_format: ClassVar[str] = ANSWER_FORMAT
    trusted: ClassVar[bool] = True
    measured: ClassVar[tuple[str, ...]] = ("format", "f1", "bonus")

    def score(self, prompt: Prompt, branch: BranchView) -> Score:
        text = branch.text
        answer = _answer(text)
        if answer is None:
            return Score(FORMAT_ERROR, False, {"format": 0.0})
        f1 = max((token_f1(answer, gold) for gold in prompt.answers), default=0.0)
        bonus = MULTI_TOOL_BONUS if f1 > 0 and "</search>" in text and "</python>" in text else 0.0
        return Score(f1 + bonus, f1 == 1.0, {"format": 1.0, "f1": f1, "bonus": bonus})


def _answer(text: str) -> str | None:
    """The boxed answer; None when any of the format rules is broken."""
    if not (_answered(text, "search") and _answered(text, "python")):
        return None
    span = answer_span(text)
    return last_boxed(span) if span is not None else None


def _answered(text: str, tool: str) -> bool:
    """Is each ``<tool>`` followed, in this order, by its close, ``<result>`` and ``</result>``?"""
    begin = text.find(f"<{tool}>")
    while begin >= 0:
        close = text.find(f"</{tool}>", begin)
        opened = text.find("<result>", begin)
        closed = text.find("</result>", max(opened, 0))
        if not begin < close < opened < closed:
            return False
        begin = text.find(f"<{tool}>", closed)
    return True
