"""The learner as a duration: a training step takes a time that depends on the unique tokens of its batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class LearnerSpeed(Protocol):
    """``system.plan.speed.LearnerRoofline``, or what a run has shown."""

    def train_s(self, tokens: float) -> float:
        """One training batch of ``tokens`` unique (packed) tokens, optimizer included."""
        ...


@dataclass(frozen=True, slots=True)
class LinearLearner:
    """``fixed_s`` for the optimizer and everything that does not grow with the batch."""

    fixed_s: float
    per_token_s: float

    def train_s(self, tokens: float) -> float:
        return self.fixed_s + self.per_token_s * tokens

    def slowed(self, factor: float) -> LinearLearner:
        """The same on a machine where everything takes ``factor`` times as long."""
        return LinearLearner(self.fixed_s * factor, self.per_token_s * factor)


@dataclass(frozen=True, slots=True)
class LinearEngine:
    """An engine whose step and prefill times are straight lines, fitted to counters."""

    step_fixed_s: float
    per_sequence_s: float
    per_prefill_s: float = 0.0
    kv_tokens: int = 1 << 40

    def step_s(self, running: float, context: float) -> float:
        return self.step_fixed_s + self.per_sequence_s * running

    def prefill_s(self, tokens: float) -> float:
        return self.per_prefill_s * tokens

    def busy_s(self, steps: float, rows: float, prefilled: float) -> float:
        """Seconds of ``steps`` steps with ``rows`` rows in all, and of so many prefilled tokens."""
        return self.step_fixed_s * steps + self.per_sequence_s * rows + self.per_prefill_s * prefilled

    def slowed(self, factor: float) -> LinearEngine:
        """The same on a machine where everything takes ``factor`` times as long."""
        return LinearEngine(
            self.step_fixed_s * factor,
            self.per_sequence_s * factor,
            self.per_prefill_s * factor,
            self.kv_tokens,
        )
