"""Which of a supervised run's models is its result, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from system.config import SftConfig


@dataclass
class SavedModel:
    """The model after so many steps."""

    step: int
    loss: float | None = None  # held-out nats per token
    solved: float | None = None  # share of the held-out questions that one of k samples answers right
    accuracy: float | None = None  # share of right ones among all samples
    lora_kept: float | None = None  # of what its adapters change, the share that it holds (Rounding.kept)

    def rate(self, right: Sequence[int], samples: int) -> None:
        """``right``: for each question how many of so many samples are."""
        self.solved = sum(count > 0 for count in right) / len(right)
        self.accuracy = sum(right) / (samples * len(right))

    def facts(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def rule(sft: SftConfig) -> str:
    """What decides: "last", "loss" or "pass@k"."""
    if sft.choose != "auto":
        return sft.choose
    return "loss" if sft.holds_out else "last"


def chosen(candidates: Sequence[SavedModel], how: str) -> tuple[SavedModel, str]:
    """The best by ``how``, and why that one.  Of equals the earliest by loss, which was trained less; by
    pass@k the one of more right samples, then the latest.
    """
    last = max(candidates, key=lambda one: one.step)
    if how == "last" or len(candidates) == 1:
        return last, "the last one" if how == "last" else f"the only one there is to choose by {how}"
    others = f"of {len(candidates)}, steps {', '.join(str(one.step) for one in candidates)}"
    if how == "loss":
        best = min(candidates, key=lambda one: (_finite(one.loss), one.step))
        return best, f"the lowest held-out loss, {best.loss:.4f} nats per token, {others}"
    best = max(candidates, key=lambda one: (_known(one.solved), _known(one.accuracy), one.step))
    return best, f"the highest {how}, {best.solved:.3f} ({best.accuracy:.3f} of all samples right), {others}"


def _known(value: float | None) -> float:
    if value is None:
        raise ValueError("a candidate that was not measured cannot be compared")
    return value


def _finite(loss: float | None) -> float:
    """A loss that is no number is worse than any other."""
    return math.inf if math.isnan(_known(loss)) else _known(loss)
