"""How an imperfect expert chooses, whose demonstrations warm a model up."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from system.config import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Skill:
    """Chances of each way of choosing; the rest is a uniform draw."""

    right: float
    slip: float = 0.0

    def __post_init__(self) -> None:
        if min(self.right, self.slip) < 0 or self.right + self.slip > 1:
            raise ConfigError(
                f"task.options: right={self.right} and slip={self.slip} must be chances that sum to at most 1"
            )

    def choose(self, right: T, options: Sequence[T], rng: random.Random) -> T:
        """Take the right option, the one after it (the first after the last), or any."""
        draw = rng.random()
        if draw < self.right:
            return right
        if draw < self.right + self.slip:
            return options[(options.index(right) + 1) % len(options)]
        return rng.choice(options)
