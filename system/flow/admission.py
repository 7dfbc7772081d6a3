"""When a new tree may start: bounded staleness.  A pure rule over the ledger."""

from __future__ import annotations

from system.config import Config
from system.flow.ledger import Ledger


def may_start(ledger: Ledger, config: Config) -> bool:
    """AReaL's staleness bound (arXiv 2505.24298 §5.1): fewer than (η + 1)·B leaves are in flight, and fewer
    than ``Config.trees_at_once`` trees grow.

    AReaL compares the leaves taken on since the beginning, those of failed trees given back, with
    (η + version + 1)·B.  Of these, version·B have been trained on, and the rest is what the ledger has in
    flight: growing, waiting for the learner, or being trained on.

    A tree counts for its budget of n leaves, however many of them scored, because a training batch is B/n
    whole trees.  So the bound holds while trees branch, batches always fill, and the loop cannot deadlock:
    when nothing grows and nothing may start, at least (η + 1)·B leaves wait for the learner, which is a batch
    or more.  A tree that fails, or is thrown out of the queue, leaves its place to another.

    At a tree's start fewer than (η + 1)·B/n trees are ahead of it, so, taken in order, it is trained on at
    most η versions later.  η = 0 is synchronous training: B/n trees per version, the next only after the
    update.
    """
    batch_trees = config.flow.batch_leaves // config.rollout.leaves
    in_flight = (config.flow.staleness + 1) * batch_trees
    return ledger.in_flight < in_flight and len(ledger.growing) < config.trees_at_once
