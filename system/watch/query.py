"""Which trees, and which points of a curve: pure functions of what was read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from system.errors import ConfigError
from system.watch.index import TreeRow

_Number = Callable[[TreeRow], float]

# Columns of the list that are numbers: what they may be filtered and sorted by.
NUMBERS: dict[str, _Number] = {
    "number": lambda row: row.number,
    "reward": lambda row: row.reward,
    "spread": lambda row: row.spread,
    "delta_h": lambda row: row.delta_h,
    "leaves": lambda row: row.leaves,
    "forks": lambda row: row.forks,
    "depth": lambda row: row.depth,
    "calls": lambda row: row.calls,
    "tokens": lambda row: row.tokens,
    "version": lambda row: row.version_max,
    "time": lambda row: row.closed_s,
    "seconds": lambda row: row.closed_s - row.started_s,
}


@dataclass(frozen=True, slots=True)
class TreeFilter:
    """Which trees to list, in which order."""

    least: Mapping[str, float] = field(default_factory=dict[str, float])  # of NUMBERS, inclusive
    most: Mapping[str, float] = field(default_factory=dict[str, float])
    task: str = ""  # exactly; "": any
    tool: str = ""
    text: str = ""  # part of the prompt's name
    sort: str = "-number"  # of NUMBERS; with a minus the largest first; unknown values come last

    @classmethod
    def of(cls, asked: Mapping[str, str]) -> TreeFilter:
        """From an address: ``spread_min=0.3``, ``depth_max=4``, ``task=…``, ``tool=…``, ``sort=-spread``, ….

        Raises :class:`ConfigError` for what is none of these.
        """
        bounds: dict[str, dict[str, float]] = {"min": {}, "max": {}}
        words: dict[str, str] = {}
        for key, value in asked.items():
            name, _, end = key.rpartition("_")
            if name in NUMBERS and end in bounds:
                if value:
                    bounds[end][name] = _number(key, value)
            elif key in ("task", "tool", "text", "sort"):
                words[key] = value
            else:
                raise ConfigError(f"trees are not filtered by {key!r}")
        if words.get("sort", "number").removeprefix("-") not in NUMBERS:
            raise ConfigError(f"trees are not sorted by {words['sort']!r}")
        return cls(least=bounds["min"], most=bounds["max"], **words)

    def chosen(self, rows: Iterable[TreeRow]) -> list[TreeRow]:
        """Those that pass, sorted; of equals the newest first.  An unknown number passes no bound."""
        found = [row for row in rows if self._passes(row)]
        key, sign = NUMBERS[self.sort.removeprefix("-")], -1 if self.sort.startswith("-") else 1

        def order(row: TreeRow) -> tuple[float, int]:
            value = key(row)
            return (sign * value if math.isfinite(value) else math.inf), -row.number

        return sorted(found, key=order)

    def _passes(self, row: TreeRow) -> bool:
        return (
            (not self.task or row.task == self.task)
            and (not self.tool or self.tool in row.tools)
            and (not self.text or self.text.lower() in row.prompt.lower())
            and all(NUMBERS[name](row) >= bound for name, bound in self.least.items())
            and all(NUMBERS[name](row) <= bound for name, bound in self.most.items())
        )


def _number(key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{key}={value!r} is not a number")
    return number


def thinned(
    x: NDArray[np.floating[Any] | np.integer[Any]], y: NDArray[np.float64], most: int
) -> list[tuple[float, float, float, float]]:
    """(x, mean, lowest, highest) of at most ``most`` stretches of neighbouring points; x is the last one's.

    Points that are not finite are left out.
    """
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if not y.size:
        return []
    begin = np.linspace(0, y.size, min(most, y.size), endpoint=False).astype(np.int64)
    count = np.diff(begin, append=y.size)
    mean = np.add.reduceat(y, begin) / count
    low, high = np.minimum.reduceat(y, begin), np.maximum.reduceat(y, begin)
    last = x[begin + count - 1].astype(np.float64)
    return list(zip(last.tolist(), mean.tolist(), low.tolist(), high.tolist(), strict=True))
