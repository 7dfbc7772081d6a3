"""Distributions that models draw from: constants, lognormals, and what a run has measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Dist(Protocol):
    """Non-negative numbers: seconds or tokens."""

    @property
    def mean(self) -> float: ...

    def draw(self, rng: np.random.Generator) -> float: ...


@dataclass(frozen=True, slots=True)
class Constant:
    mean: float

    def draw(self, rng: np.random.Generator) -> float:
        return self.mean


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Of a given *mean*, so that changing ``sigma`` changes the tail and not the amount of work."""

    mean: float
    sigma: float

    def draw(self, rng: np.random.Generator) -> float:
        return self.mean * math.exp(self.sigma * rng.standard_normal() - self.sigma**2 / 2)


class Empirical:
    """One of the values measured, each as likely as the next."""

    def __init__(self, values: Sequence[float]) -> None:
        if not len(values):
            raise ValueError("an empirical distribution needs at least one value")
        self.values = np.asarray(values, np.float64)

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    def draw(self, rng: np.random.Generator) -> float:
        return float(self.values[rng.integers(self.values.size)])


@dataclass(frozen=True, slots=True)
class ToolLatency:
    """Seconds of a tool call: lognormal around ``mean_s``, some calls ``straggler_factor`` times as long.

    The *mean* without stragglers is the same for every ``sigma``: what changes is the spread, not the amount
    of waiting.  ``sigma`` 0 is constant.
    """

    mean_s: float = 1.0
    sigma: float = 0.0  # of ln(seconds)
    stragglers: float = 0.0  # share of the calls
    straggler_factor: float = 30.0

    @property
    def mean(self) -> float:
        return self.mean_s * (1 + self.stragglers * (self.straggler_factor - 1))

    def draw(self, rng: np.random.Generator) -> float:
        late = self.stragglers > 0 and rng.random() < self.stragglers
        return Lognormal(self.mean_s, self.sigma).draw(rng) * (self.straggler_factor if late else 1.0)

    def __str__(self) -> str:
        spread = f"σ = {self.sigma:g}" if self.sigma else "constant"
        late = f", {self.stragglers:.0%} × {self.straggler_factor:g}" if self.stragglers else ""
        return spread + late
