"""Statistics of few paired runs: means over seeds with intervals, and tests without assumptions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from system.evals.estimates import half_width
from system.tree.record import Float64

_EXACT = 16  # pairs of which all signs are tried; of more, a sample


def interval(values: ArrayLike) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval by Student's t); the half is NaN of a single value."""
    x = np.asarray(values, np.float64)
    return float(x.mean()) if x.size else math.nan, half_width(x)


def sign_flip_test(differences: ArrayLike, seed: int = 0) -> float:
    """p, two-sided, of paired differences whose signs could as well be others: the share of all choices of
    signs whose mean is at least as far from 0.  Of more than 16 pairs, over 100,000 choices at random.
    """
    d = np.asarray(differences, np.float64)
    if not d.size:
        return math.nan
    if d.size <= _EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=d.size)))
    else:
        signs = np.random.default_rng(seed).choice((1.0, -1.0), (100_000, d.size))
        signs[0] = 1.0
    return float(np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-12))


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's; NaN when one of them is constant."""
    a, b = _ranks(np.asarray(x, np.float64)), _ranks(np.asarray(y, np.float64))
    if a.std() == 0 or b.std() == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def correlation_within(x: ArrayLike, y: ArrayLike, groups: Sequence[Hashable], least: int = 20) -> float:
    """The mean of Spearman's correlations within each group of ``least`` members or more, weighted by their
    number; NaN without such a group.
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    found = [(rank_correlation(a[one], b[one]), len(one)) for one in members.values() if len(one) >= least]
    known = [pair for pair in found if not math.isnan(pair[0])]
    values, weights = [pair[0] for pair in known], [pair[1] for pair in known]
    return float(np.average(values, weights=weights)) if known else math.nan


def at(budgets: Sequence[float], spent: Sequence[float], value: Sequence[float]) -> Float64:
    """``value`` at each of ``budgets``, by straight lines between the points at which ``spent`` (rising) was
    known; NaN beyond the last.
    """
    return np.interp(np.asarray(budgets, np.float64), spent, value, right=math.nan)


def spent_to_reach(goal: float, spent: Sequence[float], value: Sequence[float]) -> float:
    """What had been spent when ``value`` first was ``goal``, on a straight line; NaN if it never was."""
    if value and value[0] >= goal:
        return float(spent[0])
    for (left, low), (right, high) in itertools.pairwise(zip(spent, value, strict=True)):
        if low < goal <= high:
            return float(left + (right - left) * (goal - low) / (high - low))
    return math.nan


def _ranks(x: Float64) -> Float64:
    """Ranks, equal values sharing the mean of theirs."""
    _, where, count = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[where]
