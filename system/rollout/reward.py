"""What a reward sees and says.  The rules themselves live in ``system/rollout/rewards``."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, Protocol

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
    parts: dict[str, float] = field(default_factory=dict)  # named components, for metrics


class Reward(Protocol):
    def score(self, prompt: Prompt, branch: BranchView) -> Score | float | Awaitable[Score | float]:
        """May be ``async``.  A bare number is a value that is correct from 1 on.  Raising, or returning what
        is no finite number, leaves this one leaf unscored.

        A rule that never evaluates what a model wrote may say so (``trusted = True``): it runs also where it
        cannot be confined.
        """
        ...
