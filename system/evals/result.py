"""What the answers of an evaluation come to."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from system.evals.estimates import half_width, interval, looks, majority, pass_at
from system.evals.record import Answered


@dataclass(frozen=True, slots=True)
class EvalScores:
    """Means over questions; a question with several answers counts by the mean over these (avg@n).

    An answer that never came (a deadline, an engine's error), or that nobody could judge, counts as wrong,
    because an evaluation that drops what it failed to finish flatters itself; ``unscored`` counts
    them.  It has no reward, so the mean reward is over those that have one.
    """

    questions: int = 0
    accuracy: float = float("nan")
    accuracy_low: float = float("nan")  # its 95 % interval over the questions
    accuracy_high: float = float("nan")
    reward: float = float("nan")
    reward_low: float = float("nan")  # its 95 % interval over the questions; NaN of one question
    reward_high: float = float("nan")
    tool_calls: float = float("nan")  # per answer
    response_tokens: float = float("nan")  # that the model wrote, per answer
    # Right answers per tool call (OTC's tool productivity, arXiv 2504.14870); NaN without a call.
    productivity: float = float("nan")
    unscored: int = 0  # answers without a verdict
    samples: int = 1  # answers to a question
    pass_at: Mapping[int, float] = field(default_factory=dict)  # by k; with several samples
    majority: float = float("nan")  # maj@n: of the most frequent answer; NaN where no answer's text is known

    @classmethod
    def of(cls, answers: Sequence[Answered]) -> EvalScores:
        groups: defaultdict[str, list[Answered]] = defaultdict(list)
        for one in answers:
            groups[one.id].append(one)
        if not groups:
            return cls()
        right = [sum(bool(one.correct) for one in each) for each in groups.values()]
        sizes = [len(each) for each in groups.values()]
        accuracy = _mean([count / size for count, size in zip(right, sizes, strict=True)])
        low, high = interval(accuracy, len(groups))
        calls = sum(one.tool_calls or 0 for one in answers)
        rewards = _each(groups, "reward")
        reward, half = _mean(rewards), half_width(rewards)
        samples, told = min(sizes), any(one.text is not None for one in answers)
        return cls(
            questions=len(groups),
            accuracy=accuracy,
            accuracy_low=low,
            accuracy_high=high,
            reward=reward,
            reward_low=reward - half,
            reward_high=reward + half,
            tool_calls=_over(groups, "tool_calls"),
            response_tokens=_over(groups, "tokens"),
            productivity=sum(right) / calls if calls else float("nan"),
            unscored=sum(one.correct is None for one in answers),
            samples=samples,
            pass_at={
                k: _mean([pass_at(k, count, size) for count, size in zip(right, sizes, strict=True)])
                for k in looks(samples)
            },
            majority=_mean(
                [majority([(one.text, bool(one.correct)) for one in each]) for each in groups.values()]
            )
            if samples > 1 and told
            else float("nan"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Without what one sample does not say, the productivity of no calls, the interval of one reward."""
        found: dict[str, Any] = asdict(self) | {
            "pass_at": {str(k): value for k, value in self.pass_at.items()}
        }
        left_out = {"samples", "pass_at", "majority"} if self.samples < 2 else set[str]()
        may_lack = ("productivity", "majority", "reward_low", "reward_high")
        left_out |= {name for name in may_lack if math.isnan(found[name])}
        return {name: value for name, value in found.items() if name not in left_out}

    def metrics(self, at: str) -> dict[str, float]:
        """Flat, below ``at``."""
        found = self.to_dict()
        found |= {f"pass@{k}": value for k, value in found.pop("pass_at", {}).items()}
        return {f"{at}/{key}": value for key, value in found.items()}


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Scores over all questions of a set and per task kind, and those of further sets by name."""

    total: EvalScores = field(default_factory=EvalScores)
    kinds: Mapping[str, EvalScores] = field(default_factory=dict)
    sets: Mapping[str, EvalResult] = field(default_factory=dict)

    @classmethod
    def of(cls, answers: Sequence[Answered]) -> EvalResult:
        """``answers``: to the questions of all sets."""
        by_set: defaultdict[str, list[Answered]] = defaultdict(list)
        for one in answers:
            by_set[one.set].append(one)
        own = _of_set(by_set.pop("", []))
        return replace(own, sets={name: _of_set(each) for name, each in by_set.items()})

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``summary.json`` under ``eval.before`` and ``eval.after``."""
        kinds = {kind: one.to_dict() for kind, one in self.kinds.items()}
        sets = {name: one.to_dict() for name, one in self.sets.items()}
        return {**self.total.to_dict(), "kinds": kinds, **({"sets": sets} if sets else {})}

    def metrics(self, at: str = "eval") -> dict[str, float]:
        """Flat, under ``eval/``; of a further set, under ``eval/set/<name>/``."""
        found = self.total.metrics(at) if self.total.questions or not self.sets else {}
        for kind, scores in self.kinds.items():
            found |= scores.metrics(f"{at}/{kind}")
        for name, one in self.sets.items():
            found |= one.metrics(f"{at}/set/{name}")
        return found


def _of_set(answers: Sequence[Answered]) -> EvalResult:
    kinds: defaultdict[str, list[Answered]] = defaultdict(list)
    for one in answers:
        kinds[one.kind].append(one)
    return EvalResult(EvalScores.of(answers), {kind: EvalScores.of(kinds[kind]) for kind in sorted(kinds)})


def _over(groups: Mapping[str, Sequence[Answered]], name: str) -> float:
    """The mean over questions of :func:`_each`."""
    return _mean(_each(groups, name))


def _each(groups: Mapping[str, Sequence[Answered]], name: str) -> list[float]:
    """By question, the mean over its answers that have the number, of those that have one."""
    known = [[value for one in each if (value := getattr(one, name)) is not None] for each in groups.values()]
    return [_mean(each) for each in known if each]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
