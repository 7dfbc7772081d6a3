"""Admission, replay queue and ledger as one loop, against an adversary who decides what ends when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from flow_trees import in_flight
from flow_trees import tree as make
from hypothesis import given, settings
from hypothesis import strategies as st

from system.config import Config
from system.flow.admission import may_start
from system.flow.ledger import Ledger, LedgerError, State, Ticket
from system.flow.replay import ReplayQueue, TreeInFlight

LEAVES = 4  # n: leaves per tree


@dataclass
class Growing:
    ticket: Ticket
    ahead: int  # trees not yet trained on when it started


def config(batch: int, staleness: int, concurrency: int) -> Config:
    """``batch``: trees per training step."""
    made = Config()
    made.rollout.leaves, made.rollout.concurrency = LEAVES, concurrency
    made.flow.batch_leaves, made.flow.staleness = batch * LEAVES, staleness
    return made


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
        self.config = config(batch, staleness, concurrency)
        self.replay = ReplayQueue(batch, window, max_staleness)
        self.log: list[dict[str, Any]] = []
        self.ledger = Ledger.replay([f"q{i}" for i in range(50)], 0, [], 0, write=self.log.append)
        self.growing: list[Growing] = []
        self.training: tuple[int, ...] | None = None
        self.version = 0
        self.trained: list[int] = []
        self.lag: list[int] = []
        self.overtaken: dict[int, int] = {}  # growing number -> younger trees trained before it closed
        self.evicted = 0
        self.starts: dict[int, int] = {}

    def start(self) -> bool:
        if not may_start(self.ledger, self.config):
            return False
        ticket = self.ledger.next(self.version)
        outstanding = len(self.growing) + len(self.replay) + len(self.training or ())
        self.growing.append(Growing(ticket, outstanding))
        self.starts[self.version] = self.starts.get(self.version, 0) + 1
        return True

    def close(self, which: int) -> None:
        tree = self.growing.pop(which)
        if self.rng.random() < self.fail:
            self.ledger.retry(tree.ticket.number, "engine")
            return
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
            self.ledger.retry(tree.ticket.number, "stale")
        batch = self.replay.take(self.ledger.oldest_growing)
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
        assert loop.ledger.growing == {tree.ticket.number for tree in loop.growing}
        assert len(loop.growing) <= concurrency
        in_system = loop.version * batch + len(loop.growing) + len(loop.replay) + len(loop.training or ())
        assert in_system == loop.version * batch + loop.ledger.in_flight
        assert in_system <= (staleness + loop.version + 1) * batch
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
    assert [e["reason"] for e in loop.log if "reason" in e].count("stale") == loop.evicted


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


def numbers(batch: Sequence[TreeInFlight] | None) -> list[int] | None:
    return None if batch is None else [tree.ticket.number for tree in batch]


def test_a_straggler_is_overtaken_by_a_window_of_batches_and_then_waited_for() -> None:
    queue = ReplayQueue(batch_trees=2, window=2)
    for number in range(1, 9):  # number 0 is still growing
        queue.put(make(number))
    assert numbers(queue.take(0)) == [1, 2]  # of 1, 2, 3 in the window of four
    assert queue.take(0) is None
    assert len(queue) == 6
    queue.put(make(0))
    assert numbers(queue.take(9)) == [0, 3]


def test_a_failed_tree_is_not_waited_for() -> None:
    queue = ReplayQueue(batch_trees=2, window=1)
    for number in (11, 12, 13):
        queue.put(make(number))
    assert queue.take(10) is None
    assert numbers(queue.take(14)) == [11, 12]


def test_stale_trees_are_evicted_even_without_a_batch() -> None:
    queue = ReplayQueue(batch_trees=3, window=1, max_staleness=1)
    for number, version in ((1, 0), (2, 2), (0, 0)):
        queue.put(make(number, version))
    assert numbers(queue.evict(1)) == []
    assert numbers(queue.evict(2)) == [0, 1]
    assert queue.take(3) is None
    assert numbers(list(queue)) == [2]


def test_a_batch_can_be_put_back() -> None:
    queue = ReplayQueue(batch_trees=2, window=1)
    for number in range(3):
        queue.put(make(number))
    batch = queue.take(3)
    assert batch is not None
    queue.put(*batch[1:])  # the first is gone
    assert numbers(queue.take(3)) == [1, 2]


def test_a_tree_arrives_once() -> None:
    ledger = Ledger(["q0", "q1"], seed=0)
    for _ in range(2):
        ledger.next()
    ledger.queue(1)
    ledger.retry(0, "engine")
    for number in (0, 1):
        with pytest.raises(LedgerError):
            ledger.queue(number)
    assert (ledger.in_flight, ledger.oldest_growing) == (1, 2)


def test_admission_resumes_where_the_checkpoint_was() -> None:
    log = []
    ledger = Ledger.replay([f"q{i}" for i in range(50)], 0, [], 0, write=log.append)
    for version in range(1, 6):
        numbers = [ledger.next().number for _ in range(2)]
        for number in numbers:
            ledger.queue(number)
        ledger.train(numbers, version)
        ledger.trained(numbers)
    ledger.next()  # lost with the process
    restored = Ledger.replay([f"q{i}" for i in range(50)], 0, log, 5)
    started = 0
    while may_start(restored, config(batch=2, staleness=1, concurrency=99)):
        restored.next(5)
        started += 1
    assert started == 2 * 8 // 4
