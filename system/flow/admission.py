"""When a new tree may start: bounded staleness, counted in leaves.  A pure state machine."""

from __future__ import annotations


class Admission:
    """AReaL's staleness bound (arXiv 2505.24298 §5.1), counted in leaves reserved when a tree starts.

    A tree may start iff ``reserved + accepted < (η + version + 1)·B`` and fewer than ``concurrency`` trees
    run. ``reserved``: leaves of running trees; ``accepted``: leaves of trees that closed well, trained ones
    included, since the beginning; ``version``: how many batches have been trained on.

    A tree counts for the n leaves reserved at its start from first to last, however many of them scored,
    because a training batch is B/n whole trees.  So the bound holds while trees branch, batches always fill,
    and the loop cannot deadlock: when nothing runs and nothing may start, at least (η + 1)·B accepted leaves
    wait for the learner, which is a batch or more.  A tree that fails, or that is evicted from the queue
    later, must give its leaves back (``finish(n, 0)``, ``evict(n)``), or the learner would wait for them for
    ever.

    At a tree's start fewer than (η + 1)·B/n trees are ahead of it, so, taken in order, it is trained on at
    most η versions later.  η = 0 is synchronous training: B/n trees per version, the next only after the
    update.
    """

    def __init__(self, batch_leaves: int, staleness: int, concurrency: int, accepted: int = 0) -> None:
        """``accepted``: on resume, ``version · batch_leaves``: what the checkpoint has been trained on."""
        if batch_leaves < 1 or staleness < 0 or concurrency < 1 or accepted < 0:
            raise ValueError(f"{batch_leaves=}, {staleness=}, {concurrency=}, {accepted=}: out of range")
        self.batch_leaves, self.staleness, self.concurrency = batch_leaves, staleness, concurrency
        self.accepted = accepted  # leaves of trees that closed well, those already trained on included
        self.reserved = 0  # leaves of trees that are growing
        self.running = 0  # trees growing

    def capacity(self, version: int) -> int:
        """Leaves that may still be reserved while the learner is at ``version``."""
        return (self.staleness + version + 1) * self.batch_leaves - self.reserved - self.accepted

    def may_start(self, version: int) -> bool:
        return self.running < self.concurrency and self.capacity(version) > 0

    def start(self, leaves: int) -> None:
        """A tree starts and reserves ``leaves`` (its budget n, which should divide B)."""
        if leaves < 1:
            raise ValueError(f"a tree reserves at least one leaf, not {leaves}")
        self.running += 1
        self.reserved += leaves

    def finish(self, reserved: int, kept_leaves: int) -> None:
        """A tree that reserved ``reserved`` leaves ended; ``kept_leaves`` 0: it failed, they go back."""
        if self.running < 1 or reserved > self.reserved:
            raise ValueError(f"no running tree has reserved {reserved} leaves (reserved: {self.reserved})")
        self.running -= 1
        self.reserved -= reserved
        if kept_leaves > 0:
            self.accepted += reserved

    def evict(self, reserved: int) -> None:
        """An accepted tree was thrown out before training: another may take its place in the batch."""
        if reserved > self.accepted:
            raise ValueError(f"cannot give back {reserved} of {self.accepted} accepted leaves")
        self.accepted -= reserved
