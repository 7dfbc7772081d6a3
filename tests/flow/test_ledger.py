from __future__ import annotations

from typing import Any

import pytest
from crashing_run import PROMPTS, CrashingRun
from hypothesis import given, settings
from hypothesis import strategies as st

from system.flow.ledger import Ledger, LedgerError, State, Ticket, accounted


def logged() -> tuple[Ledger, list[dict[str, Any]]]:
    """A new run's ledger, and its log."""
    log: list[dict[str, Any]] = []
    return Ledger.replay(PROMPTS, 0, [], 0, max_attempts=2, write=log.append), log


def test_epochs_are_shuffled_by_the_seed_and_cover_every_prompt() -> None:
    ledger = Ledger(PROMPTS, seed=3)
    tickets = [ledger.next() for _ in range(21)]
    assert [t.number for t in tickets] == list(range(21))
    epochs = [[t.prompt_id for t in tickets if t.epoch == e] for e in range(3)]
    assert all(sorted(order) == PROMPTS for order in epochs)
    assert len({tuple(order) for order in epochs}) == 3
    again, other = Ledger(PROMPTS, seed=3), Ledger(PROMPTS, seed=4)
    assert [again.next() for _ in range(21)] == tickets
    assert [other.next() for _ in range(21)] != tickets


def test_a_prompt_that_comes_back_goes_first_and_is_abandoned_in_the_end() -> None:
    ledger, log = logged()
    first = ledger.next()
    second = ledger.next()
    assert ledger.retry(first.number, "engine")
    assert ledger.state(0, first.prompt_id) == State.PENDING
    retried = ledger.next()
    assert retried == Ticket(2, 0, first.prompt_id, attempt=2)
    ledger.queue(retried.number)
    assert not ledger.retry(retried.number, "stale")
    assert ledger.state(0, first.prompt_id) == State.ABANDONED
    ledger.abandon(second.number, "too long")
    assert [e["reason"] for e in log if "reason" in e] == ["engine", "stale", "too long"]
    states = [ledger.state(0, p) for p in PROMPTS]
    assert states.count(State.ABANDONED) == 2
    assert states.count(State.PENDING) == len(PROMPTS) - 2


@pytest.mark.parametrize(
    "act",
    [
        lambda ledger: ledger.queue(9),
        lambda ledger: ledger.queue(1),  # queued already
        lambda ledger: ledger.train([0], 1),  # still growing
        lambda ledger: ledger.trained([1]),
        lambda ledger: ledger.trained([2]),  # trained already
        lambda ledger: ledger.retry(2, "again"),
        lambda ledger: ledger.abandon(2, "again"),
        lambda ledger: ledger.ticket(2),
    ],
)
def test_illegal_transitions_are_refused_and_change_nothing(act) -> None:
    ledger, log = logged()
    for _ in range(3):
        ledger.next()
    ledger.queue(1)
    ledger.queue(2)
    ledger.train([2], 1)
    ledger.trained([2])
    before, written = [ledger.state(0, p) for p in PROMPTS], len(log)
    with pytest.raises(LedgerError):
        act(ledger)
    assert [ledger.state(0, p) for p in PROMPTS] == before
    assert len(log) == written
    assert ledger.growing == {0}


def test_a_log_of_another_run_is_refused() -> None:
    ledger, log = logged()
    ledger.next()
    for prompts, seed in ((PROMPTS, 1), (PROMPTS[:-1], 0), ([*PROMPTS[:-1], "other"], 0)):
        with pytest.raises(LedgerError, match="another run"):
            Ledger.replay(prompts, seed, log, trained_through=0)
    with pytest.raises(LedgerError, match="unknown event"):
        Ledger.replay(PROMPTS, 0, [*log, {"event": "dance"}], trained_through=0)
    with pytest.raises(LedgerError, match="where this run would issue"):
        Ledger.replay(PROMPTS, 0, [log[0], {**log[1], "prompt": "q99"}], trained_through=0)
    with pytest.raises(LedgerError, match="not unique"):
        Ledger(["a", "a"], seed=0)


@pytest.mark.parametrize(
    "event",
    [{}, {"event": None}, {"event": "train"}, {"event": "train", "version": "1", "numbers": []}],
    ids=str,
)
def test_what_is_no_event_is_told(event: dict[str, Any]) -> None:
    with pytest.raises(LedgerError, match="no event of ours"):
        accounted([{"event": "open"}, event])


def test_an_empty_log_is_a_new_run() -> None:
    ledger, log = logged()
    assert [(event["event"], event["seed"], event["prompts"]) for event in log] == [("open", 0, len(PROMPTS))]
    assert ledger.next().number == 0


def test_a_crash_rolls_back_to_the_checkpoint() -> None:
    ledger, log = logged()
    tickets = [ledger.next() for _ in range(6)]
    for ticket in tickets[:5]:
        ledger.queue(ticket.number)
    ledger.train([0, 1], version=1)
    ledger.trained([0, 1])
    ledger.train([2], version=2)  # the checkpoint of version 2 was written before "trained" was logged
    ledger.train([3], version=3)
    restored = Ledger.replay(PROMPTS, 0, log, trained_through=2)
    states = [restored.state(0, t.prompt_id) for t in tickets]
    assert states == [State.TRAINED] * 3 + [State.PENDING] * 3
    assert (restored.in_flight, restored.oldest_growing) == (0, 6)
    again = [restored.next() for _ in range(4)]
    assert [t.prompt_id for t in again[:3]] == [
        t.prompt_id for t in tickets[3:]
    ]  # the lost ones first, in order
    assert [t.number for t in again] == [6, 7, 8, 9]
    assert {t.attempt for t in again} == {1}
    assert again[3].prompt_id not in {t.prompt_id for t in tickets}


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 40), max_size=5))
def test_nothing_is_lost_or_trained_twice_through_any_crashes(seed: int, lives: list[int]) -> None:
    run = CrashingRun(seed)
    for steps in lives:
        for _ in range(steps):
            run.step()
            run.check()
        run.crash()
        run.check()
    goal = run.epoch + 2
    while run.epoch < goal:  # on to a later epoch: every older prompt must come to an end
        run.step()
    for _ in range(10_000):
        left = [
            (epoch, p)
            for epoch in range(goal)
            for p in PROMPTS
            if run.ledger.state(epoch, p) not in (State.TRAINED, State.ABANDONED)
        ]
        if not left:
            break
        run.step(fresh=any(run.ledger.state(*key) == State.PENDING for key in left))
    assert not left, "a prompt was skipped"
    run.check()


@given(st.integers(0, 2**32 - 1), st.integers(0, 60))
def test_replaying_the_log_rebuilds_the_same_ledger(seed: int, steps: int) -> None:
    run = CrashingRun(seed)
    for _ in range(steps):
        run.step()
    run.write()
    log = [*run.log]
    twin = Ledger.replay(PROMPTS, 5, run.log, run.version, max_attempts=3, write=log.append)
    restored = Ledger.replay(PROMPTS, 5, log, run.version, max_attempts=3)
    everything = [(e, p) for e in range(run.epoch + 1) for p in PROMPTS]
    assert [twin.state(*key) for key in everything] == [restored.state(*key) for key in everything]
    assert [twin.next() for _ in range(20)] == [restored.next() for _ in range(20)]


def test_a_machines_fault_is_no_attempt_also_after_a_restart() -> None:
    ledger, log = logged()
    for _ in range(5):  # max_attempts is 2
        assert ledger.retry(ledger.next().number, "engine lost", blameless=True)
    ticket = ledger.next()
    assert (ticket.number, ticket.attempt) == (5, 1)
    assert ledger.retry(ticket.number, "deadline")
    again = Ledger.replay(PROMPTS, 0, list(log), 0, max_attempts=2)
    for one in (ledger, again):
        ticket = one.next()
        assert (ticket.number, ticket.attempt) == (6, 2)
        assert one.retry(ticket.number, "worker lost", blameless=True)
        assert not one.retry(one.next().number, "deadline")
