"""Admission, replay queue and ledger as one loop, against an adversary who decides what ends when."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from system.flow.admission import Admission
from system.flow.ledger import Ledger, State
from system.flow.replay import Entry, ReplayQueue

LEAVES = 4  # n: leaves per tree


@dataclass
class Growing:
    number: int
    version: int
    ahead: int  # trees not yet trained on when it started


class Loop:
    def __init__(
        self,
        seed: int,
        staleness: int,
        window: int,
        batch: int,
        concurrency: int,
        max_staleness: int,
        fail: float,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.fail = fail
        self.admission = Admission(batch * LEAVES, staleness, concurrency)
        self.replay: ReplayQueue[Growing] = ReplayQueue(batch, window, max_staleness)
        self.ledger = Ledger([f"q{i}" for i in range(50)], seed=0, max_attempts=3)
        self.growing: list[Growing] = []
        self.training: tuple[int, ...] | None = None
        self.version = 0
        self.trained: list[int] = []
        self.lag: list[int] = []
        self.overtaken: dict[int, int] = {}  # growing number -> younger trees trained before it closed
        self.evicted = 0
        self.starts: dict[int, int] = {}

    def start(self) -> bool:
        if not self.admission.may_start(self.version):
            return False
        self.admission.start(LEAVES)
        ticket = self.ledger.next()
        outstanding = len(self.growing) + len(self.replay) + len(self.training or ())
        self.growing.append(Growing(ticket.number, self.version, outstanding))
        self.starts[self.version] = self.starts.get(self.version, 0) + 1
        return True

    def close(self, which: int) -> None:
        tree = self.growing.pop(which)
        if self.rng.random() < self.fail:
            self.admission.finish(LEAVES, kept_leaves=0)
            self.replay.skip(tree.number)
            self.ledger.retry(tree.number, "engine")
            return
        self.admission.finish(
            LEAVES, kept_leaves=int(self.rng.integers(2, LEAVES + 1))
        )  # some leaves unscored
        self.replay.put(Entry(tree.number, tree.version, tree, LEAVES))
        self.ledger.queue(tree.number)

    def take(self) -> bool:
        """A batch for the learner, if it is free and one is ready."""
        if self.training is not None:
            return False
        batch, evicted = self.replay.take(self.version)
        for eviction in evicted:
            assert eviction.reason == "stale"
            assert self.version - eviction.entry.version > self.replay.max_staleness
            self.evicted += 1
            self.admission.evict(eviction.entry.leaves)
            self.ledger.retry(eviction.entry.number, eviction.reason)
        if batch is None:
            return bool(evicted)
        numbers = [e.number for e in batch]
        assert numbers == sorted(numbers)
        assert len(numbers) == self.replay.batch_trees
        for tree in self.growing:
            younger = sum(n > tree.number for n in numbers)
            self.overtaken[tree.number] = self.overtaken.get(tree.number, 0) + younger
        self.lag += [self.version - e.version for e in batch]
        self.training = tuple(numbers)
        self.ledger.train(numbers, self.version + 1)
        return True

    def update(self) -> bool:
        if self.training is None:
            return False
        self.ledger.trained(self.training)
        self.trained += self.training
        self.training = None
        self.version += 1
        return True

    def step(self, cruel: bool) -> None:
        """A random possible move.  ``cruel``: the oldest tree closes only when nothing else can happen."""
        moves = self.rng.permutation(4)
        for move in moves:
            if move == 0 and self.start():
                return
            if move == 1 and len(self.growing) > cruel:
                self.close(int(self.rng.integers(int(cruel), len(self.growing))))
                return
            if move == 2 and self.take():
                return
            if move == 3 and self.update():
                return
        assert self.growing, f"deadlock at version {self.version}: nothing grows, starts, trains or is ready"
        self.close(0)


def _settings() -> dict[str, st.SearchStrategy]:
    return {
        "seed": st.integers(0, 2**32 - 1),
        "staleness": st.integers(0, 4),
        "window": st.integers(1, 4),
        "batch": st.integers(1, 5),
        "concurrency": st.integers(1, 40),
        "fail": st.sampled_from([0.0, 0.1, 0.4]),
        "cruel": st.booleans(),
    }


@settings(max_examples=150)
@given(**_settings())
def test_the_loop_never_deadlocks_and_staleness_is_bounded(
    seed: int, staleness: int, window: int, batch: int, concurrency: int, fail: float, cruel: bool
) -> None:
    loop = Loop(seed, staleness, window, batch, concurrency, staleness + window, fail)
    for _ in range(400):
        loop.step(cruel)
        assert loop.admission.reserved == LEAVES * len(loop.growing)
        assert loop.admission.running <= concurrency
        in_system = loop.admission.reserved + loop.admission.accepted
        assert in_system <= (staleness + loop.version + 1) * batch * LEAVES
        queued = len(loop.ledger.numbers(State.QUEUED))
        assert queued == len(loop.replay)
    assert loop.version > 0
    assert loop.evicted == 0
    assert max(loop.lag) <= staleness + window
    assert max(loop.overtaken.values(), default=0) < window * batch
    assert len(set(loop.trained)) == len(loop.trained) == loop.version * batch
    assert all(tree.ahead < (staleness + 1) * batch for tree in loop.growing)


@settings(max_examples=150)
@given(**_settings(), slack=st.integers(0, 2))
def test_a_tighter_limit_evicts_with_a_reason_and_still_makes_progress(
    seed: int,
    staleness: int,
    window: int,
    batch: int,
    concurrency: int,
    fail: float,
    cruel: bool,
    slack: int,
) -> None:
    limit = min(staleness + slack, staleness + window)
    loop = Loop(seed, staleness, window, batch, concurrency, limit, fail)
    for _ in range(400):
        loop.step(cruel)
    assert loop.version > 0
    assert max(loop.lag) <= limit
    assert loop.replay.dropped == ({"stale": loop.evicted} if loop.evicted else {})
    assert loop.ledger.reasons().get("stale", 0) == loop.evicted


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([0.0, 0.3]))
def test_no_staleness_is_synchronous_training(seed: int, batch: int, fail: float) -> None:
    loop = Loop(seed, 0, 4, batch, 100, 0, fail)
    for _ in range(300):
        loop.step(cruel=False)
    assert loop.version > 0
    assert set(loop.lag) == {0}
    if fail == 0:
        done = [loop.starts[v] for v in range(loop.version)]
        assert done == [batch] * loop.version  # a batch of trees per version, no more


def test_in_order_closing_keeps_staleness_within_eta() -> None:
    loop = Loop(0, 2, 1, 4, 1000, 2, fail=0.0)
    for _ in range(50):
        while loop.start():
            pass
        while loop.growing:
            loop.close(0)
        assert loop.take()
        assert loop.update()
    assert max(loop.lag) == 2  # the bound is met, not merely kept


def test_a_straggler_is_overtaken_by_a_window_of_batches_and_then_waited_for() -> None:
    queue: ReplayQueue[str] = ReplayQueue(batch_trees=2, window=2, max_staleness=9)
    for number in range(1, 9):  # number 0 is still growing
        queue.put(Entry(number, 0, "tree"))
    assert queue.ready == 3  # numbers 1, 2, 3 of the four in the window
    assert [e.number for e in queue.take(0).batch or ()] == [1, 2]
    assert queue.take(0).batch is None
    assert (queue.oldest_growing, len(queue)) == (0, 6)
    queue.put(Entry(0, 0, "late"))
    assert [e.number for e in queue.take(0).batch or ()] == [0, 3]
    assert queue.oldest_growing == 9


def test_a_failed_tree_is_not_waited_for() -> None:
    queue: ReplayQueue[str] = ReplayQueue(batch_trees=2, window=1, max_staleness=9, first=10)
    for number in (11, 12, 13):
        queue.put(Entry(number, 0, "tree"))
    assert queue.take(0).batch is None
    queue.skip(10)
    assert [e.number for e in queue.take(0).batch or ()] == [11, 12]


def test_evictions_are_returned_and_counted_even_without_a_batch() -> None:
    queue: ReplayQueue[str] = ReplayQueue(batch_trees=3, window=1, max_staleness=1)
    for number, version in enumerate((0, 2)):
        queue.put(Entry(number, version, f"tree {number}"))
    batch, evicted = queue.take(2)
    assert batch is None
    assert [(e.entry.item, e.reason) for e in evicted] == [("tree 0", "stale")]
    assert [e.entry.item for e in queue.drain("shutdown")] == ["tree 1"]
    assert queue.dropped == {"stale": 1, "shutdown": 1}
    assert len(queue) == 0


def test_a_number_arrives_once() -> None:
    queue: ReplayQueue[str] = ReplayQueue(1, 1, 0)
    queue.put(Entry(1, 0, "tree"))
    assert [queue.seen(number) for number in range(3)] == [False, True, False]
    queue.skip(0)
    assert [queue.seen(number) for number in range(3)] == [True, True, False]
    for number in (0, 1):
        with pytest.raises(ValueError, match="already"):
            queue.skip(number)


def test_admission_refuses_impossible_accounts() -> None:
    admission = Admission(8, 0, 4)
    with pytest.raises(ValueError, match="at least one"):
        admission.start(0)
    with pytest.raises(ValueError, match="no running tree"):
        admission.finish(4, 4)
    admission.start(4)
    with pytest.raises(ValueError, match="no running tree"):
        admission.finish(8, 8)
    admission.finish(4, 1)
    with pytest.raises(ValueError, match="give back"):
        admission.evict(8)
    admission.evict(4)
    assert (admission.accepted, admission.reserved, admission.running) == (0, 0, 0)
    with pytest.raises(ValueError, match="staleness=-1"):
        Admission(8, -1, 4)


def test_admission_resumes_where_the_checkpoint_was() -> None:
    admission = Admission(8, staleness=1, concurrency=99, accepted=5 * 8)
    started = 0
    while admission.may_start(version=5):
        admission.start(4)
        started += 1
    assert started == 2 * 8 // 4
