"""Guided trees: which are, by how many actions, that the fewest are found, and that a resume keeps it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from crashing_run import PROMPTS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loop import World
from test_loop import settings as configured

from system.config import ConfigError, load
from system.flow.curriculum import Pool, PoolWeights
from system.flow.guidance import Guidance, Guides, Search
from system.flow.ledger import Ledger, LedgerError
from system.tree.prompt import Prompt
from system.twin.clock import run

WEIGHTS = PoolWeights(trees=2, solved=0.1, hopeless=1.0)
GUIDES = Guides(hopeless=0.5, others=0.0, actions=dict.fromkeys(PROMPTS, 5))


@given(st.integers(1, 40), st.data())
def test_the_search_finds_the_fewest_actions_that_help(most: int, data: st.DataObject) -> None:
    """By halving: in ⌈log2⌉ + 1 trees, and once they are found they, or fewer, are told."""
    least = data.draw(st.integers(1, most))
    search, told = Search(most), list[int]()
    for _ in range(60):
        told.append(search.next())
        assert 1 <= told[-1] <= most
        search.told(told[-1], told[-1] >= least)
    assert least in told[: int(np.ceil(np.log2(most))) + 1]
    assert max(told[20:]) <= least, "never more than is known to be enough"
    assert told[20:].count(least) >= 5


@given(st.integers(1, 9), st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=40))
def test_whatever_trees_say_and_in_whatever_order_there_is_a_next(
    most: int, said: list[tuple[int, bool]]
) -> None:
    search = Search(most)
    for actions, success in said:
        search.told(min(actions, most), success)
        assert 1 <= search.next() <= most


def test_what_helped_once_and_fails_now_is_searched_above() -> None:
    """The model, or the luck, has changed."""
    search = Search(8)
    for actions, success in ((4, True), (2, True), (1, False), (2, True)):
        assert search.next() == actions
        search.told(actions, success)
    assert search.next() == 1, "2 were the least and helped again: perhaps fewer do now"
    search.told(1, False)
    search.told(2, False)
    assert search.next() == 5


def test_a_share_of_the_trees_is_guided_where_there_are_actions() -> None:
    guidance = Guidance(Guides(0.5, 0.1, {"q": 3, "bare": 0}), seed=0)
    drawn = {
        pool: Counter(guidance.actions("q", pool) for _ in range(4000))
        for pool in (Pool.HOPELESS, Pool.USEFUL, None)
    }
    assert {pool: count.keys() for pool, count in drawn.items()} == {pool: {0, 2} for pool in drawn}
    assert [count[2] / 4000 for count in drawn.values()] == pytest.approx([0.5, 0.1, 0.1], abs=0.03)
    assert not any(guidance.actions(question, Pool.HOPELESS) for question in ("bare", "unheard of") * 20)


def test_without_guides_the_order_and_the_log_are_what_they_were() -> None:
    assert Guides.of(load(None, []), [Prompt("q", (), ())]) is None
    logs: list[list[dict[str, Any]]] = [[], []]
    for log, more in zip(logs, ({}, {"guides": None}), strict=True):
        ledger = Ledger.replay(PROMPTS, 3, [], 0, write=log.append, weights=WEIGHTS, **more)
        for number in range(20):
            assert ledger.next().guide == 0
            ledger.queue(number, 0.0)
    assert logs[0] == logs[1]
    assert not any("guide" in event for event in logs[0])


def grown(ledger: Ledger, trees: int, least: int = 3) -> list[tuple[str, int]]:
    """Trees one after another, of questions that only ``least`` actions or more help."""
    found: list[tuple[str, int]] = []
    for _ in range(trees):
        ticket = ledger.next()
        ledger.queue(ticket.number, 0.5 if ticket.guide >= least else 0.0)
        found.append((ticket.prompt_id, ticket.guide))
    return found


def test_hopeless_questions_get_guided_trees_and_stay_hopeless_until_they_do_without() -> None:
    ledger = Ledger(PROMPTS, 0, weights=WEIGHTS, guides=GUIDES)
    found = grown(ledger, 400)
    assert ledger.curriculum
    assert ledger.curriculum.shares()[Pool.HOPELESS] == 1
    trees = Counter[str]()
    for question, guide in found:
        trees[question] += 1
        assert not guide or trees[question] > 1, "a plain tree without a right answer comes first"
    assert {guide for _, guide in found} == {0, 2, 3} | {4, 5} & {guide for _, guide in found}
    assert sum(guide > 0 for _, guide in found) / len(found) == pytest.approx(0.5, abs=0.08)
    learned = [ledger.next() for _ in PROMPTS]
    for ticket in learned:
        ledger.queue(ticket.number, 1.0)
    plain = {ticket.prompt_id for ticket in learned if not ticket.guide}
    shares = ledger.curriculum.shares()
    assert shares[Pool.USEFUL] + shares[Pool.SOLVED] == pytest.approx(len(plain) / len(PROMPTS))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 60), st.booleans())
def test_a_resumed_run_guides_as_one_that_goes_on(seed: int, steps: int, curriculum: bool) -> None:
    """Trees in flight are issued again with the guide they had; those that had closed close once more."""
    log: list[dict[str, Any]] = []
    weights = WEIGHTS if curriculum else None
    guides = Guides(0.6, 0.4, dict.fromkeys(PROMPTS, 6))
    ours = Ledger.replay(PROMPTS, seed, [], 0, write=log.append, weights=weights, guides=guides)
    rng = np.random.default_rng(seed)
    said: dict[tuple[int, str], float] = {}
    guide: dict[tuple[int, str], int] = {}
    for _ in range(steps):
        growing = sorted(ours.growing)
        if growing and rng.random() < 0.5:
            number = int(rng.choice(growing))
            rate = said[ours.ticket(number).key] = float(rng.choice([0.0, 0.0, 0.5, 1.0]))
            ours.queue(number, rate)
        else:
            ticket = ours.next()
            guide[ticket.key] = ticket.guide
    again = Ledger.replay(PROMPTS, seed, list(log), 0, weights=weights, guides=guides)
    for _ in range(ours.in_flight):
        ticket = again.next()
        assert ticket.guide == guide[ticket.key]
        if ticket.key in said:
            again.queue(ticket.number, said[ticket.key])
    for _ in range(40):
        one, two = ours.next(), again.next()
        assert (one.key, one.guide) == (two.key, two.guide)
        if rng.random() < 0.8:
            rate = float(rng.choice([0.0, 0.5, 1.0]))
            ours.queue(one.number, rate)
            again.queue(two.number, rate)


def test_a_tree_that_is_lost_is_grown_again_with_its_guide() -> None:
    ledger = Ledger(PROMPTS, 0, guides=Guides(0, 1, dict.fromkeys(PROMPTS, 5)))
    ticket = ledger.next()
    assert ticket.guide == 3
    ledger.retry(ticket.number, "worker lost", blameless=True)
    assert ledger.next().guide == 3


def test_a_log_of_other_guides_is_refused() -> None:
    log: list[dict[str, Any]] = []
    Ledger.replay(PROMPTS, 0, [], 0, write=log.append, weights=WEIGHTS, guides=GUIDES).next()
    for other in (None, Guides(0.4, 0.0, GUIDES.actions), Guides(0.5, 0.0, {"q0": 1})):
        with pytest.raises(LedgerError, match="another run"):
            Ledger.replay(PROMPTS, 0, log, 0, weights=WEIGHTS, guides=other)


def test_a_log_of_a_version_that_knew_no_guides_goes_on() -> None:
    old = [{"event": "open", "seed": 0, "prompts": 7, "digest": ""}]
    log: list[dict[str, Any]] = []
    Ledger.replay(PROMPTS, 0, [], 0, write=log.append)
    assert log[0].keys() == old[0].keys()
    ticket = Ledger.replay(PROMPTS, 0, log, 0).next()
    issued = {"event": "issue", "number": 0, "epoch": 0, "prompt": ticket.prompt_id, "attempt": 1}
    assert Ledger.replay(PROMPTS, 0, [*log, issued], 0).next().prompt_id == ticket.prompt_id


def test_the_loop_tells_what_guided_trees_earned() -> None:
    """Also without a curriculum, for the search."""
    world = World(configured("flow.staleness=0"))
    names = [f"q{i}" for i in range(4)]
    guides = Guides(0, 1, dict.fromkeys(names, 8))
    world.ledger = Ledger.replay(names, 0, [], 0, write=world.log.append, guides=guides)
    world.loop.ledger = world.ledger
    run(world.run(8))
    closed = [event for event in world.log if event["event"] == "queue"]
    assert {event["rate"] for event in closed} == {1.0}, "all of its answers are right"
    told = [event["guide"] for event in world.log if event["event"] == "issue" and event["prompt"] == "q0"]
    assert told[:3] == [4, 2, 1]


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["guide.hopeless=0.5"], "set flow.curriculum=true, or guide.others"),
        (["guide.others=0.5", "guide.text=begin like this"], "guide.text has no {actions}"),
        (["guide.others=1.5"], r"guide.others=1.5 must be in [0, 1]"),
    ],
)
def test_settings_that_do_not_agree(words: list[str], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, words)
    assert fault in str(caught.value)
