"""No credit: for distillation alone, where the teacher's opinion is all that is learned from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from system.learn.credit.base import Credit
from system.tree.record import Float64
from system.tree.stats import TreeStats


class NoCredit(Credit):
    """Every advantage is 0, whatever the rewards."""

    def advantages(self, batch: Sequence[TreeStats]) -> list[Float64]:
        return [np.zeros(tree.leaves) for tree in batch]
