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
    """Of a given mean, so that changing ``sigma`` (0: constant) changes the tail and not the amount of work;
    some draws, as slow tool calls, are ``straggler_factor`` times as large."""

    usual: float  # mean without stragglers
    sigma: float = 0.0  # of the logarithm
    stragglers: float = 0.0  # share of the draws
    straggler_factor: float = 30.0

    @property
    def mean(self) -> float:
        return self.usual * (1 + self.stragglers * (self.straggler_factor - 1))

    def draw(self, rng: np.random.Generator) -> float:
        late = self.stragglers > 0 and rng.random() < self.stragglers
        factor = math.exp(self.sigma * rng.standard_normal() - self.sigma**2 / 2)
        return self.usual * factor * (self.straggler_factor if late else 1.0)

    def __str__(self) -> str:
        spread = f"σ = {self.sigma:g}" if self.sigma else "constant"
        late = f", {self.stragglers:.0%} × {self.straggler_factor:g}" if self.stragglers else ""
        return spread + late


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
