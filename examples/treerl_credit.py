"""A credit and a branching policy of one's own.  In the directory of this file, or with it on PYTHONPATH:

    espalier train ../configs/quickstart.yaml learn.credit=treerl_credit:ParentMean \
        branching=treerl_credit:AtUnsureResults branching.options.threshold=0.2
"""

import math
from dataclasses import dataclass

import numpy as np

from system.learn.credit.base import Credit
from system.rollout.branching import Decision, Policy


class ParentMean(Credit):
    """Each turn by what it made of what it was given, as in TreeRL (arXiv 2506.11902): the mean reward below
    it minus the mean below its parent.
    """

    per = "node"

    def advantages(self, batch):
        below = [tree.mean_reward_below for tree in batch]
        return [mean - mean[np.maximum(tree.parent, 0)] for tree, mean in zip(batch, below, strict=True)]


@dataclass(frozen=True)
class AtUnsureResults(Policy):
    """Fork after every tool result whose first tokens are uncertain, until the tree has its leaves."""

    threshold: float = 0.1  # of entropy / ln V

    def decide(self, probe, state, rng):
        unsure = self.known(probe.entropy) > self.threshold
        return Decision(int(unsure), float(unsure), math.nan, probe.delta_h)
