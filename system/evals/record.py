"""The answers of an evaluation, one by one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from system.tree.prompt import Prompt
from system.tree.record import Outcome
from system.tree.stats import TreeStats

OWN = "held-out"  # the name of the task's own questions, where others stand beside them


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, once: ``sample`` counts its answers from 0, ``seed`` is what this one is sampled with."""

    set: str  # "" for the task's own held-out questions
    prompt: Prompt
    sample: int
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.set, self.prompt.id, self.sample


@dataclass(frozen=True, slots=True)
class Answered:
    """What became of one :class:`Asked`."""

    set: str
    id: str
    kind: str
    sample: int
    correct: bool | None = None  # None: nobody could say; counts as wrong
    reward: float | None = None
    outcome: str = "unanswered"  # the branch's end, or that no attempt came to one
    tool_calls: int | None = None
    tokens: int | None = None  # that the model wrote
    text: str | None = None  # the final answer
    seconds: float | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        return self.set, self.id, self.sample

    @property
    def there(self) -> bool:
        """Whether an answer came, whatever it is worth."""
        return self.outcome != "unanswered"

    @classmethod
    def missing(cls, asked: Asked) -> Answered:
        """No attempt was answered."""
        return cls(asked.set, asked.prompt.id, asked.prompt.kind, asked.sample)

    @classmethod
    def of(cls, asked: Asked, tree: TreeStats) -> Answered:
        """``tree``: of one leaf; without any, nothing was answered."""
        if not tree.leaves:
            return cls.missing(asked)
        reward = float(tree.reward[0])
        return cls(
            *(asked.set, asked.prompt.id, asked.prompt.kind, asked.sample),
            correct=bool(tree.correct[0]) if tree.correct.size else None,
            reward=reward if np.isfinite(reward) else None,
            outcome=Outcome(int(tree.outcome[0])).name.lower(),
            tool_calls=int(tree.calls_per_leaf[0]),
            tokens=int(tree.response_tokens[0]),
            text=tree.answers[0] if tree.answers else None,
            seconds=round(tree.seconds, 3),
        )


def digest(asked: Sequence[Asked]) -> str:
    """SHA-256 of the questions: what is asked, and what would be right."""
    found = hashlib.sha256()
    for one in asked:
        prompt = one.prompt
        about = [one.set, prompt.id, one.sample, prompt.messages, prompt.answers]
        found.update(json.dumps(about, default=str).encode() + b"\n")
    return found.hexdigest()
