"""ARPO's reward with its false positives and negatives mended.  The same shape, the default.

Against the released rule (:mod:`system.rollout.rewards.arpo_release`):

* tags count only where the model wrote them, so a tool's answer can neither break nor make the format, and
  a call counts as answered when a result really followed it;
* numbers and formulas are compared as such (-5 is not 5, 1/2 is not 12, ``\\frac{1}{2}`` is 0.5, 9.8 is
  9.80);
* the multi-tool bonus is for calls that were made and succeeded, not for tags that were mentioned.
"""

from __future__ import annotations

import re
from typing import ClassVar

from system.rollout.reward import BranchView, Score
from system.rollout.rewards.arpo_release import ANSWER_FORMAT, FORMAT_ERROR, MULTI_TOOL_BONUS
from system.rollout.rewards.equality import equal, is_mathematical, is_strict, parse_number, words
from system.rollout.words import answer_span, last_boxed, overlap
from system.tools.outcome import ToolStatus
from system.tree.prompt import Prompt
from system.tree.record import Kind

CALL_TAGS = ("search", "python", "tool_call")

# Words, or one number: compared as they stand.
_PLAIN = re.compile(r"-?\d{1,15}(\.\d{1,15})?|[^\W\d_]{2,20}( [^\W\d_]{2,20}){0,20}")
_OPENERS = re.compile("|".join(f"<({tag})>" for tag in CALL_TAGS))


class ArpoReward:
    """-1 for a format error; else the answer's score, the best over the golds, plus 0.1 if that is above 0
    and at least two different tools were called with success.

    The answer's score is 1 or 0 when both answers are mathematical, token F1 when they are words.  Range
    {-1, 0} ∪ (0, 1.1].  ``correct`` is equality of the answers; neither partial overlap nor the bonus makes
    it so.
    """

    answer_format: ClassVar[str] = ANSWER_FORMAT
    trusted: ClassVar[bool] = True
    measured: ClassVar[tuple[str, ...]] = ("format", "answer", "bonus")

    def quick(self, prompt: Prompt, branch: BranchView) -> Score | None:
        """The score where no formula has to be read, which takes microseconds; else None."""
        answer = extract_answer(branch)
        plain = answer is None or all(_PLAIN.fullmatch(text) for text in (answer, *prompt.answers))
        return self.score(prompt, branch) if plain else None

    def score(self, prompt: Prompt, branch: BranchView) -> Score:
        answer = extract_answer(branch)
        if answer is None:
            return Score(FORMAT_ERROR, False, {"format": 0.0})
        best, correct = max((_compare(answer, gold) for gold in prompt.answers), default=(0.0, False))
        used = {tool for tool, status in branch.tools if status == ToolStatus.OK}
        bonus = MULTI_TOOL_BONUS if best > 0 and len(used) >= 2 else 0.0
        return Score(best + bonus, correct, {"format": 1.0, "answer": best, "bonus": bonus})


def extract_answer(branch: BranchView) -> str | None:
    """The boxed answer, stripped; None when the model broke the format.

    The format: as many ``<think>`` as ``</think>``, at least one; every call opened is closed in the same
    segment and followed by a result; one ``<answer>`` with its ``</answer>``; a ``\\boxed{…}`` between
    them.
    """
    span = answer_span(branch.model_text)
    boxed = last_boxed(span) if span is not None and _calls_answered(branch) else None
    return boxed.strip() if boxed is not None else None


def _calls_answered(branch: BranchView) -> bool:
    for i, (kind, text) in enumerate(branch.segments):
        if kind != Kind.MODEL:
            continue
        openers = list(_OPENERS.finditer(text))
        if not openers:
            continue
        has_result = i + 1 < len(branch.segments) and branch.segments[i + 1][0] == Kind.TOOL
        closed = all(text.find(f"</{m.group()[1:]}", m.end()) >= 0 for m in openers)
        if not (has_result and closed):
            return False
    return True


def _compare(answer: str, gold: str) -> tuple[float, bool]:
    """(score in [0, 1], equal?)"""
    if equal(answer, gold):
        return 1.0, True
    if is_mathematical(answer) and is_mathematical(gold):
        return 0.0, False
    said, meant = _tokens(answer), _tokens(gold)
    score = overlap(said, meant)
    if score == 1:  # other marks between digits are paid nothing, another order of words as one word amiss
        score = 0.0 if is_strict(answer) or is_strict(gold) else 1 - 1 / len(meant)
    return score, False


def _tokens(text: str) -> list[str]:
    """Normalised words in which numbers stay numbers and formulas formulas: "-5 km" and "5 km" share only
    the unit.
    """
    if not is_strict(text):
        return words(text)
    tokens: list[str] = []
    for word in text.split():
        number = parse_number(word.strip(",;:!?()"))
        if number is not None:
            tokens.append(str(number))
        else:
            tokens += [word] if is_strict(word) else words(word)
    return tokens
