"""Pools of difficulty: what comes when, for how long it may not come, and that a resume changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from crashing_run import PROMPTS, CrashingRun
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loop import World
from test_loop import settings as configured

from system.config import load
from system.flow.curriculum import Curriculum, Pool, PoolWeights
from system.flow.ledger import Ledger, LedgerError, State
from system.twin.clock import run

WEIGHTS = PoolWeights(trees=2, solved=0.1, hopeless=0.1)


def drawn(curriculum: Curriculum, rates: Mapping[str, float], draws: int) -> list[str]:
    """Questions in the order of their draws; a tree of each closes at once, with its rate."""
    found: list[str] = []
    for _ in range(draws):
        visit, question = curriculum.draw()
        curriculum.back(visit, question, rates[question])
        found.append(question)
    return found


def test_without_a_curriculum_the_order_and_the_log_are_what_they_were() -> None:
    log: list[dict[str, Any]] = []
    ledger = Ledger.replay(PROMPTS, 3, [], 0, write=log.append, weights=PoolWeights.of(load(None, [])))
    order = [ledger.next().prompt_id for _ in range(14)]
    assert " ".join(order) == "q5 q6 q2 q1 q4 q3 q0 q2 q1 q4 q0 q5 q6 q3"
    ledger.queue(0)
    ledger.silent(1)
    assert set(log[0]) == {"event", "seed", "prompts", "digest"}
    assert log[-2:] == [{"event": "queue", "number": 0}, {"event": "silent", "number": 1}]


def test_all_questions_come_once_in_the_seeded_order_before_anything_is_known() -> None:
    plain, ledger = Ledger(PROMPTS, 3), Ledger(PROMPTS, 3, weights=WEIGHTS)
    assert [ledger.next() for _ in PROMPTS] == [plain.next() for _ in PROMPTS]
    more = [ledger.next() for _ in PROMPTS]  # nothing has closed: those that went first come again
    assert [ticket.epoch for ticket in more] == [1] * len(PROMPTS)
    assert len({ticket.prompt_id for ticket in more}) == len(PROMPTS)


def test_pools_go_by_the_last_trees() -> None:
    curriculum = Curriculum(["q"], 0, WEIGHTS)

    def pool(rate: float | None) -> str:
        curriculum.back(*curriculum.draw(), rate)
        (found,) = [name for name, share in curriculum.shares().items() if share]
        return found

    rates = [None, 1.0, 0.5, 1.0, 1.0, None, 0.0, 0.0, 1.0, 0.0]
    assert [pool(rate) for rate in rates] == [
        *("unknown", "solved", "useful", "useful", "solved", "solved", "useful", "hopeless"),
        *("useful", "useful"),
    ]


def test_a_tree_that_is_grown_again_replaces_what_it_said() -> None:
    curriculum = Curriculum(["q"], 0, WEIGHTS)
    visit, question = curriculum.draw()
    curriculum.back(visit, question, 1.0)
    assert curriculum.shares()[Pool.SOLVED] == 1
    curriculum.back(visit, question, 0.0)
    assert curriculum.shares()[Pool.HOPELESS] == 1


@pytest.mark.parametrize("seed", range(3))
def test_solved_and_hopeless_questions_come_as_rarely_as_their_weights_say(seed: int) -> None:
    rates = {f"{kind}{i}": rate for kind, rate in (("s", 1.0), ("h", 0.0), ("u", 0.5)) for i in range(20)}
    curriculum = Curriculum([*rates], seed, PoolWeights(trees=1, solved=0.2, hopeless=0.1))
    found = Counter(question[0] for question in drawn(curriculum, rates, 60 + 13_000)[60:])
    assert found["s"] / found["u"] == pytest.approx(0.2, rel=0.1)
    assert found["h"] / found["u"] == pytest.approx(0.1, rel=0.1)
    assert curriculum.shares() == {"unknown": 0, "useful": 1 / 3, "solved": 1 / 3, "hopeless": 1 / 3}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(0.1, 1.0))
def test_no_question_is_passed_over_for_ever(seed: int, questions: int, weight: float) -> None:
    """Whatever the trees earn and however long they take: nine times the mean wait that the docstring
    promises is more than all the waits of these runs.
    """
    rng = np.random.default_rng(seed)
    names = [f"q{i}" for i in range(questions)]
    curriculum = Curriculum(names, seed, PoolWeights(1, weight, weight))
    away: list[tuple[int, str]] = []
    last = dict.fromkeys(names, 0)
    limit = 9 * questions / weight * (1 + np.log(questions))
    for now in range(1000):
        away.append(curriculum.draw())
        last[away[-1][1]] = now
        while away and rng.random() < 0.7:
            visit, question = away.pop(int(rng.integers(len(away))))
            rate = [None, 0.0, 0.5, 1.0][int(rng.integers(4))]
            curriculum.back(visit, question, rate)
        at_home = set(names) - {question for _, question in away}
        assert all(now - last[question] <= limit for question in at_home)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 40), max_size=5))
def test_nothing_is_lost_or_trained_twice_through_any_crashes(seed: int, lives: list[int]) -> None:
    crashing = CrashingRun(seed, WEIGHTS)
    for steps in lives:
        for _ in range(steps):
            crashing.step()
            crashing.check()
        crashing.crash()
        crashing.check()
    crashing.write()
    issued = {(e["epoch"], e["prompt"]) for e in crashing.log if e["event"] == "issue"}
    for _ in range(10_000):
        states = {crashing.ledger.state(*key) for key in issued}
        if states <= {State.TRAINED, State.ABANDONED}:
            break
        crashing.step(fresh=State.PENDING in states)
    else:
        raise AssertionError("a question was skipped")
    crashing.check()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 80))
def test_a_run_that_is_resumed_draws_what_one_that_goes_on_draws(seed: int, steps: int) -> None:
    """A checkpoint keeps the trees in flight: all are issued again, and those that had closed close again."""
    crashing = CrashingRun(seed, WEIGHTS)
    for _ in range(steps):
        crashing.step()
    if training := crashing.ledger.numbers(State.TRAINING):  # a checkpoint is made between two steps
        crashing.ledger.trained(training)
    crashing.write()
    version = max((e["version"] for e in crashing.log if e["event"] == "train"), default=0)
    ours = crashing.ledger
    again = crashing.replayed(crashing.log, version)
    closed = {ours.ticket(number).key for number in ours.numbers(State.QUEUED)}
    rates = {e["number"]: e["rate"] for e in crashing.log if e["event"] == "queue"}
    said = {ours.ticket(number).key: rates[number] for number in ours.numbers(State.QUEUED)}
    for _ in range(len(ours.numbers(State.GROWING)) + len(closed) + _pending(ours, crashing.log)):
        ticket = again.next()
        if ticket.key in closed:
            again.queue(ticket.number, said[ticket.key])
    for _ in range(_pending(ours, crashing.log)):
        ours.next()
    assert len(again.growing) == len(ours.growing)
    rng = np.random.default_rng(seed)
    for _ in range(40):
        one, two = ours.next(), again.next()
        assert one.key == two.key
        if rng.random() < 0.8:
            rate = float(rng.choice([0.0, 0.5, 1.0]))
            ours.queue(one.number, rate)
            again.queue(two.number, rate)


def _pending(ledger: Ledger, log: list[dict[str, Any]]) -> int:
    """Questions that have come back to be grown again."""
    issued = {(e["epoch"], e["prompt"]) for e in log if e["event"] == "issue"}
    return sum(ledger.state(*key) == State.PENDING for key in issued)


def test_a_log_of_another_curriculum_is_refused() -> None:
    log: list[dict[str, Any]] = []
    Ledger.replay(PROMPTS, 0, [], 0, write=log.append, weights=WEIGHTS).next()
    for other in (None, PoolWeights(3, 0.1, 0.1)):
        with pytest.raises(LedgerError, match="another run"):
            Ledger.replay(PROMPTS, 0, log, 0, weights=other)


def test_the_loop_tells_what_trees_earned_and_how_large_the_pools_are() -> None:
    config = configured("flow.staleness=0", "flow.curriculum=true", "flow.skip_silent=1")
    world = World(config)  # whose answers are all right
    names = [f"q{i}" for i in range(4)]
    log = world.log = []
    world.ledger = Ledger.replay(names, 0, [], 0, write=log.append, weights=PoolWeights.of(config))
    world.loop.ledger = world.ledger
    run(world.run(3))
    closed = [event for event in log if event["event"] in ("queue", "silent")]
    assert {event["event"] for event in closed} == {"queue", "silent"}
    assert {event["rate"] for event in closed} == {1.0}
    assert world.pools == [{"unknown": 0.25, "useful": 0.0, "solved": 0.75, "hopeless": 0.0}] + 2 * [
        {"unknown": 0.0, "useful": 0.0, "solved": 1.0, "hopeless": 0.0}
    ]
