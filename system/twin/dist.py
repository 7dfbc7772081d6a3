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
    value: float

    @property
    def mean(self) -> float:
        return self.value

    def draw(self, rng: np.random.Generator) -> float:
        return self.value


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
class Stragglers:
    """``base``, but a ``share`` of the draws is ``factor`` times as large."""

    base: Dist
    share: float = 0.05
    factor: float = 30.0

    @property
    def mean(self) -> float:
        return self.base.mean * (1 + self.share * (self.factor - 1))

    def draw(self, rng: np.random.Generator) -> float:
        late = rng.random() < self.share
        return self.base.draw(rng) * (self.factor if late else 1.0)
