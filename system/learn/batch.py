"""What a training batch becomes before any rank computes: credit -> leaf weights -> plan, in one direction.

Everything here is made from the trees' statistics, on every rank alike.  What follows is each rank's own: it
fetches ``plan.trees(dp_rank)`` and packs them (:func:`system.tree.pack.pack_share`); the trainer then steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from system.config import Config, ConfigError
from system.learn.aggregate import Aggregate, leaf_weights
from system.learn.credit.base import Credit, assign
from system.plugins import AGGREGATES, CREDITS
from system.tree.factor import EntropyFactor
from system.tree.plan import Assigned, BatchPlan, Floats, plan_update, row_budget
from system.tree.record import Float64, path_sum
from system.tree.stats import TreeStats


class BatchPlanner:
    """Plans batches for ``dp`` data-parallel ranks; the only state is the credit's own."""

    def __init__(
        self,
        config: Config,
        *,
        flat: bool,
        dp: int = 1,
        pad_to: int = 1,
        clip_scale: Callable[[TreeStats], Float64] | None = None,
    ) -> None:
        """``flat``: train root-to-leaf paths (``Objective.flat``); ``clip_scale``: the objective's, if it has
        one.  Raises ``ConfigError``.
        """
        learn = config.learn
        self.learn, self.flat, self.dp, self.pad_to = learn, flat, dp, pad_to
        self.taught = config.learn.teacher != "none"
        self.clip_scale = clip_scale
        self.credit: Credit = CREDITS.make(learn.credit.name, learn.credit.options)
        self.aggregate: Aggregate = AGGREGATES.make(
            learn.aggregate.name, learn.aggregate.options, length_cap=config.rollout.max_response_tokens
        )
        if flat and self.credit.hard:
            raise ConfigError(
                f"learn.credit={learn.credit.name} averages over shared tokens, and "
                f"learn.objective={learn.objective.name} has none: use arpo-soft or grpo"
            )

    def plan(self, trees: Sequence[TreeStats]) -> BatchPlan:
        """``learn.updates`` optimizer steps, each on its share of the trees.  Updates the credit's state."""
        learn = self.learn
        gains = assign(self.credit, trees)
        # Trees without signal do not move the loss unless a regulariser acts on every token.
        drop_zero = not learn.kl_coef and not learn.entropy_coef and not self.taught
        updates: list[Any] = []
        weights: list[Floats] = []
        bounds = np.linspace(0, len(trees), learn.updates + 1).astype(int).tolist()
        for first, end in pairwise(bounds):
            some = trees[first:end]
            w = leaf_weights(self.aggregate, some, hard=self.credit.hard)
            weights += w
            updates.append(
                plan_update(
                    some,
                    gains[first:end],
                    w,
                    budget=self._budget(some, self.flat),
                    dp=self.dp,
                    per=self.credit.per,
                    hard=self.credit.hard,
                    flat=self.flat,
                    pad_to=self.pad_to,
                    drop_zero=drop_zero,
                    first=first,
                )
            )
        assigned = Assigned(trees, gains, weights, self.credit.per, self.credit.hard)
        strength = learn.entropy_factor
        factor = EntropyFactor.over(strength, trees, weights) if strength else None
        scale = [self.clip_scale(tree) for tree in trees] if self.clip_scale else None
        silent = sum(not np.any(gain) for gain in gains)
        return BatchPlan(updates, self.pad_to, silent, assigned, factor, scale)

    def supervised(self, trees: Sequence[TreeStats]) -> BatchPlan:
        """One step on every MODEL token, once per leaf through it, scored or not, all weighed alike."""
        total = max(sum(int(tree.response_tokens.sum()) for tree in trees), 1)
        w = [(tree.response_tokens > 0).astype(np.float32) / np.float32(total) for tree in trees]
        zero: list[Floats] = [np.zeros_like(x) for x in w]
        budget = self._budget(trees, flat=False)
        update = plan_update(trees, zero, w, budget=budget, dp=self.dp, pad_to=self.pad_to)
        return BatchPlan([update], self.pad_to)

    def _budget(self, trees: Sequence[TreeStats], flat: bool) -> int:
        sizes = [int(tree.length.sum()) for tree in trees]
        if flat:
            each = [(tree, path_sum(tree.parent, tree.length)) for tree in trees]
            sizes = [int(sums[end]) for tree, sums in each for end, _ in tree.chains()]
        return row_budget(sizes, self.learn.micro_tokens, self.dp, self.pad_to)
