"""What a reward sees and says.  The rules themselves live in ``system/rollout/rewards``."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from system.errors import EspalierError
from system.text import as_text
from system.tree.prompt import Prompt
from system.tree.record import Kind, Outcome


@dataclass(frozen=True, slots=True)
class BranchView:
    """One root-to-leaf path as text, after the prompt, in runs of one author (MODEL or TOOL)."""

    segments: tuple[tuple[Kind, str], ...]
    outcome: Outcome
    tools: tuple[tuple[str, str], ...] = ()  # (tool name, ToolStatus value) of each call made, in order
    tokens: int = 0  # after the prompt, tool results included: what rollout.max_response_tokens limits
    steps: tuple[float, ...] = ()  # what single turns earned (an environment's), added to the score anyway
    result: dict[str, Any] | None = None  # what the branch's world came to, where there is one that tells

    @property
    def text(self) -> str:
        """Everything after the prompt, tool text included."""
        return "".join(text for _, text in self.segments)

    @property
    def model_text(self) -> str:
        """Only what the model wrote."""
        return "".join(text for kind, text in self.segments if kind == Kind.MODEL)


@dataclass(frozen=True, slots=True)
class Score:
    value: float  # the reward the learner sees
    correct: bool  # is the final answer right?
    parts: dict[str, float] = field(default_factory=dict)  # named components, kept in the tree's record


class ScoreFailed(EspalierError):
    """One leaf has no score.  The message names the reward.

    ``reason``: a word for counters, one of :data:`REASONS`.
    """

    def __init__(self, text: str, reason: str = "exception") -> None:
        super().__init__(as_text(text))  # it may quote the model's answer
        self.reason = reason if reason in REASONS else "exception"


REASONS = {
    "exception": "the reward raised",
    "number": "it returned no finite number",
    "deadline": "it was late",
    "process": "its process was lost",
    "endpoint": "a judge's server does not answer, or refuses",
    "verdict": "a judge's answer is no verdict",
}


class Reward(Protocol):
    """Scores leaves one by one, as they end.

    A class that compares the leaves of a tree has ``score_group`` instead (:class:`GroupReward`).  Further
    attributes are optional:

    * ``trusted = True``: a rule that never evaluates what a model wrote runs also where it cannot be
      confined;
    * ``answer_format``: what form an answer must have, in words that are added to the prompt;
    * ``measured = ("format", …)``: those of its ``parts`` that become metrics, ``reward/<name>``.
    """

    def score(self, prompt: Prompt, branch: BranchView) -> Score | float | Awaitable[Score | float]:
        """May be ``async``.  A bare number is a value that is correct from 1 on.  Raising, or returning what
        is no finite number, leaves this one leaf unscored.
        """
        ...


class GroupReward(Protocol):
    """Scores all leaves of a tree at once, when the last of them has ended."""

    def score_group(
        self, prompt: Prompt, branches: Sequence[BranchView]
    ) -> Sequence[Score | float | None] | Awaitable[Sequence[Score | float | None]]:
        """A score for each branch, in their order; None for one that has none.  May be ``async``."""
        ...
