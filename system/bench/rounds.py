"""Ways compared round by round: in what order they run, and what their ratios come to.

What differs from round to round (a seed, how busy the machine is) is the same for all ways of one, so the
ratio within a round says more than either figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TypeVar

from system.errors import ConfigError
from system.evals.estimates import half_width

T = TypeVar("T")


def checked(rounds: int) -> int:
    """``rounds``, as the command line has it.  Raises ConfigError below 1."""
    if rounds < 1:
        raise ConfigError(f"--rounds {rounds}: 1 or more")
    return rounds


def in_turn(ways: Sequence[T], number: int) -> list[T]:
    """The order of ``ways`` in round ``number``, from 0: it shifts by one each round."""
    at = number % len(ways) if ways else 0
    return [*ways[at:], *ways[:at]]


def together(rates: Iterable[tuple[float, float]]) -> float:
    """The rate over all runs, of each of which the rate and how long it lasted are given."""
    amounts, spans = zip(*((rate * span, span) for rate, span in rates), strict=True)
    return sum(amounts) / sum(spans)


def mean_ratio(ratios: Sequence[float]) -> str:
    """Their geometric mean, and its 95 % interval by Student's t."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, half = fmean(logs), half_width(logs)
    between = f" ({math.exp(mean - half):.2f} to {math.exp(mean + half):.2f})" if len(logs) > 1 else ""
    return f"{math.exp(mean):.2f}{between}"
