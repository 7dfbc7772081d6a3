"""Admission, replay queue and ledger as one loop, against an adversary who decides what ends when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from flow_trees import in_flight
from flow_trees import tree as make
from hypothesis import given, settings
from hypothesis import strategies as st

from system.flow.admission import Admission
from system.flow.ledger import Ledger, State, Ticket
from system.flow.replay import ReplayQueue, TreeInFlight

LEAVES = 4  # n: leaves per tree


@dataclass
class Growing:
    ticket: Ticket
    ahead: int  # trees not yet trained on when it started


class Loop:
    def __init__(
        self,
        seed: int,
        staleness: int,
        window: int,
        batch: int,
        concurrency: int,
        max_staleness: int | None,
        fail: float,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.fail = fail
        self.admission = Admission(batch * LEAVES, staleness, concurrency)
        self.replay: ReplayQueue[None] = ReplayQueue(batch, window, max_staleness)
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
        ticket = self.ledger.next(self.version)
        outstanding = len(self.growing) + len(self.replay) + len(self.training or ())
        self.growing.append(Growing(ticket, outstanding))
        self.starts[self.version] = self.starts.get(self.version, 0) + 1
        return True

    def close(self, which: int) -> None:
        tree = self.growing.pop(which)
        if self.rng.random() < self.fail:
            self.admission.finish(LEAVES, kept_leaves=0)
            self.replay.skip(tree.ticket.number)
            self.ledger.retry(tree.ticket.number, "engine")
            return
        self.admission.finish(
            LEAVES, kept_leaves=int(self.rng.integers(2, LEAVES + 1))
        )  # some leaves unscored
        self.replay.put(in_flight(tree.ticket))
        self.ledger.queue(tree.ticket.number)

    def take(self) -> bool:
        """A batch for the learner, if it is free and one is ready."""
        if self.training is not None:
            return False
        evicted = self.replay.evict(self.version)
        for tree in evicted:
            assert self.replay.max_staleness is not None
            assert self.version - tree.ticket.start_version > self.replay.max_staleness
            self.evicted += 1
            self.admission.evict(LEAVES)
            self.ledger.retry(tree.ticket.number, "stale")
        batch = self.replay.take()
        if batch is None:
            return bool(evicted)
        numbers = [tree.ticket.number for tree in batch]
        assert numbers == sorted(numbers)
        assert len(numbers) == self.replay.batch_trees
        for tree in self.growing:
            number = tree.ticket.number
            younger = sum(n > number for n in numbers)
            self.overtaken[number] = self.overtaken.get(number, 0) + younger
        self.lag += [self.version - tree.ticket.start_version for tree in batch]
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
@given(**_settings(), bounded=st.booleans())
def test_the_loop_never_deadlocks_and_staleness_is_bounded(
    seed: int,
    staleness: int,
    window: int,
    batch: int,
    concurrency: int,
    fail: float,
    cruel: bool,
    bounded: bool,
) -> None:
    limit = staleness + window if bounded else None  # a limit that nothing reaches, or none
    loop = Loop(seed, staleness, window, batch, concurrency, limit, fail)
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
    assert [e["reason"] for e in loop.ledger.drain() if "reason" in e].count("stale") == loop.evicted


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


def numbers(batch: Sequence[TreeInFlight[None]] | None) -> list[int] | None:
    return None if batch is None else [tree.ticket.number for tree in batch]


def test_a_straggler_is_overtaken_by_a_window_of_batches_and_then_waited_for() -> None:
    queue: ReplayQueue[None] = ReplayQueue(batch_trees=2, window=2)
    for number in range(1, 9):  # number 0 is still growing
        queue.put(make(number))
    assert queue.ready == 3  # numbers 1, 2, 3 of the four in the window
    assert numbers(queue.take()) == [1, 2]
    assert queue.take() is None
    assert (queue.oldest_growing, len(queue)) == (0, 6)
    queue.put(make(0))
    assert numbers(queue.take()) == [0, 3]
    assert queue.oldest_growing == 9


def test_a_failed_tree_is_not_waited_for() -> None:
    queue: ReplayQueue[None] = ReplayQueue(batch_trees=2, window=1, first=10)
    for number in (11, 12, 13):
        queue.put(make(number))
    assert queue.take() is None
    queue.skip(10)
    assert numbers(queue.take()) == [11, 12]


def test_stale_trees_are_evicted_even_without_a_batch() -> None:
    queue: ReplayQueue[None] = ReplayQueue(batch_trees=3, window=1, max_staleness=1)
    for number, version in ((1, 0), (2, 2), (0, 0)):
        queue.put(make(number, version))
    assert numbers(queue.evict(1)) == []
    assert numbers(queue.evict(2)) == [0, 1]
    assert queue.take() is None
    assert numbers(list(queue)) == [2]


def test_a_batch_can_be_put_back() -> None:
    queue: ReplayQueue[None] = ReplayQueue(batch_trees=2, window=1)
    for number in range(3):
        queue.put(make(number))
    batch = queue.take()
    assert batch is not None
    queue.put_back(batch[1:])  # the first is gone
    assert numbers(queue.take()) == [1, 2]


def test_a_number_arrives_once() -> None:
    queue: ReplayQueue[None] = ReplayQueue(1, 1)
    queue.put(make(1))
    queue.skip(0)
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
