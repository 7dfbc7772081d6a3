"""Which question comes next, by what its trees earned before: pools of difficulty.  A pure state machine.

prime-rl keeps pools of easy, normal and hard problems, by the mean reward of a problem's last group, and
draws no more from those of easy and hard ones.  Here they come back rarely, for what was solved may be
forgotten, and what was hopeless learned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from system.config import Config


class Pool(StrEnum):
    """A question's kind, by the mean correctness of its last trees."""

    UNKNOWN = "unknown"  # no tree of it has been judged
    USEFUL = "useful"  # some answers were right, some wrong
    SOLVED = "solved"  # every answer was right
    HOPELESS = "hopeless"  # none was


@dataclass(frozen=True, slots=True)
class PoolWeights:
    """How the pools are made, and how often a question of each comes, one of use coming once."""

    trees: int  # a question's last trees that say what it is; fewer where there are fewer
    solved: float
    hopeless: float

    @classmethod
    def of(cls, config: Config) -> PoolWeights | None:
        """None without ``flow.curriculum``."""
        flow = config.flow
        if not flow.curriculum:
            return None
        return cls(flow.curriculum_trees, flow.curriculum_solved, flow.curriculum_hopeless)


class Curriculum:
    """The questions in their pools.  One that is drawn is away until that visit is :meth:`back`.

    A draw is of a pool first, with probability proportional to (its questions at home) · (its weight), then
    of the question that has been in it the longest.  So a question of weight w comes w times as often as one
    of weight 1, and none is passed over for ever: the pool of one with n ahead of it is drawn with
    probability w·(n + 1)/N or more, N questions in all, so that whatever the others do it waits for at most
    (N/w)·(1 + ln N) draws on average.

    Everything follows from the seed and the order of the calls.
    """

    def __init__(self, order: Sequence[str], seed: int, weights: PoolWeights) -> None:
        """``order``: of the questions' first draws, as far as they are all unknown."""
        self._seed, self._trees = seed, weights.trees
        self._weight = {Pool.UNKNOWN: 1.0, Pool.USEFUL: 1.0}
        self._weight |= {Pool.SOLVED: weights.solved, Pool.HOPELESS: weights.hopeless}
        self._home: dict[Pool, dict[str, None]] = {pool: {} for pool in Pool}  # in order of their coming
        self._home[Pool.UNKNOWN] |= dict.fromkeys(order)
        self._pool = dict.fromkeys(order, Pool.UNKNOWN)
        self._away: dict[str, None] = {}  # in order of their going
        self._rates: dict[str, dict[int, float]] = {}  # by question: mean correctness of its last visits
        self._visits: Counter[str] = Counter()
        self._draws = 0

    def draw(self) -> tuple[int, str]:
        """The next question, and how often it was drawn before.

        Where all are away, the one that went first is drawn once more.
        """
        pools = [pool for pool in Pool if self._home[pool]]
        if pools:
            question = next(iter(self._home[self._choose(pools)]))
            del self._home[self._pool[question]][question]
        else:
            question = next(iter(self._away))
            del self._away[question]
        self._away[question] = None
        self._draws += 1
        self._visits[question] += 1
        return self._visits[question] - 1, question

    def back(self, visit: int, question: str, rate: float | None) -> None:
        """The tree of a visit has closed; ``rate``: the share of its judged answers that are right.

        Without one (nothing was judged, or there is no tree) the question stays what it was.  A visit that
        closes a second time, its tree having been lost and grown anew, replaces what it said at first.
        """
        if rate is not None:
            rates = self._rates.setdefault(question, {})
            rates[visit] = rate
            if len(rates) > self._trees:
                del rates[min(rates)]
        pool, was = self._pool_of(question), self._pool[question]
        self._pool[question] = pool
        if question in self._away:
            if visit == self._visits[question] - 1:
                del self._away[question]
                self._home[pool][question] = None
        elif pool != was:
            del self._home[was][question]
            self._home[pool][question] = None

    def pool(self, question: str) -> Pool:
        return self._pool[question]

    def shares(self) -> dict[str, float]:
        """The share of the questions in each pool, those that are away included."""
        count = Counter(self._pool.values())
        return {str(pool): count[pool] / len(self._pool) for pool in Pool}

    def _choose(self, pools: Sequence[Pool]) -> Pool:
        weights = np.array([self._weight[pool] * len(self._home[pool]) for pool in pools])
        drawn = np.random.default_rng([self._seed, self._draws]).random() * weights.sum()
        at = int(np.searchsorted(weights.cumsum(), drawn, side="right"))
        return pools[min(at, len(pools) - 1)]  # the sum may round below the draw

    def _pool_of(self, question: str) -> Pool:
        rates = self._rates.get(question, {}).values()
        if not rates:
            return Pool.UNKNOWN
        if min(rates) >= 1:
            return Pool.SOLVED
        return Pool.HOPELESS if max(rates) <= 0 else Pool.USEFUL
