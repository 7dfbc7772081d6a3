"""The result of an evaluation: one tree per held-out question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from system.tree.stats import TreeStats


@dataclass(frozen=True, slots=True)
class EvalScores:
    """Means over questions; a question with several leaves counts by the mean over its leaves.

    A leaf that never came to an answer of its own (a deadline, an engine error) counts as wrong, because an
    evaluation that drops what it failed to finish flatters itself; ``unscored`` says how many there were.
    It has no reward, so the mean reward is over the scored leaves.
    """

    questions: int = 0
    accuracy: float = float("nan")
    reward: float = float("nan")
    tool_calls: float = float("nan")  # calls per question
    response_tokens: float = float("nan")  # tokens the model wrote per question
    unscored: int = 0  # leaves without a verdict

    @classmethod
    def of(cls, stats: Sequence[TreeStats]) -> EvalScores:
        stats = [one for one in stats if one.leaves]
        if not stats:
            return cls()
        rewards = [float(one.rewards.mean(dtype=np.float64)) for one in stats if one.rewards.size]
        return cls(
            questions=len(stats),
            accuracy=float(np.mean([one.correct.sum() / one.leaves for one in stats])),
            reward=float(np.mean(rewards)) if rewards else float("nan"),
            tool_calls=float(np.mean([one.calls_per_leaf.mean() for one in stats])),
            response_tokens=float(np.mean([one.response_tokens.mean() for one in stats])),
            unscored=sum(one.leaves - one.correct.size for one in stats),
        )


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Scores over all questions, and per task kind."""

    total: EvalScores = field(default_factory=EvalScores)
    kinds: Mapping[str, EvalScores] = field(default_factory=dict)

    @classmethod
    def of(cls, stats: Sequence[TreeStats]) -> EvalResult:
        """``stats``: of one closed tree per question.  A question without one is the caller's to tell."""
        kinds = sorted({one.task for one in stats})
        return cls(
            total=EvalScores.of(stats),
            kinds={kind: EvalScores.of([one for one in stats if one.task == kind]) for kind in kinds},
        )

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``summary.json`` under ``eval.before`` and ``eval.after``."""
        return {**asdict(self.total), "kinds": {kind: asdict(one) for kind, one in self.kinds.items()}}

    def metrics(self) -> dict[str, float]:
        """Flat, under ``eval/``."""
        groups = {"eval": self.total} | {f"eval/{kind}": scores for kind, scores in self.kinds.items()}
        return {f"{at}/{key}": value for at, one in groups.items() for key, value in asdict(one).items()}
