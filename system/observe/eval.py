"""The result of an evaluation: one tree per held-out question."""

from __future__ import annotations

from collections import Counter, defaultdict
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
    def of(cls, stats: Sequence[TreeStats], unanswered: int = 0) -> EvalScores:
        """``unanswered``: questions without a tree, wrong as well."""
        stats = [one for one in stats if one.leaves]
        return cls(
            questions=len(stats) + unanswered,
            accuracy=_mean([one.correct.sum() / one.leaves for one in stats] + [0.0] * unanswered),
            reward=_mean([one.rewards.mean(dtype=np.float64) for one in stats if one.rewards.size]),
            tool_calls=_mean([one.calls_per_leaf.mean() for one in stats]),
            response_tokens=_mean([one.response_tokens.mean() for one in stats]),
            unscored=sum(one.leaves - one.correct.size for one in stats) + unanswered,
        )


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Scores over all questions, and per task kind."""

    total: EvalScores = field(default_factory=EvalScores)
    kinds: Mapping[str, EvalScores] = field(default_factory=dict)

    @classmethod
    def of(cls, stats: Sequence[TreeStats], unanswered: Sequence[str] = ()) -> EvalResult:
        """``stats``: of one closed tree per question; ``unanswered``: the kinds of the questions without."""
        missing, trees = Counter(unanswered), defaultdict[str, list[TreeStats]](list)
        for one in stats:
            trees[one.task].append(one)
        return cls(
            total=EvalScores.of(stats, missing.total()),
            kinds={kind: EvalScores.of(trees[kind], missing[kind]) for kind in sorted({*trees, *missing})},
        )

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``summary.json`` under ``eval.before`` and ``eval.after``."""
        return {**asdict(self.total), "kinds": {kind: asdict(one) for kind, one in self.kinds.items()}}

    def metrics(self) -> dict[str, float]:
        """Flat, under ``eval/``."""
        groups = {"eval": self.total} | {f"eval/{kind}": scores for kind, scores in self.kinds.items()}
        return {f"{at}/{key}": value for at, one in groups.items() for key, value in asdict(one).items()}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
