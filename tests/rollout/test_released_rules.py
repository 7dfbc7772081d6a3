"""The lockstep schedule with ``arpo-release`` is the released code's loop: its rules, and its figures.

The rules are written down here a second time, in a few lines and without a clock.  The real rollout must do
exactly what they do, draw for draw; and they must give the known figures.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from system.bench.baselines import WAYS
from system.bench.growth import Scenario, agent, grow
from system.bench.schedules import RELEASED
from system.twin.dist import Lognormal

LEAVES, ROOTS, LIMIT = 16, 8, 3
Key = tuple[int, ...]


@dataclass
class Slot:
    key: Key
    calls: int = 0
    forked: int = 0


@dataclass
class Tally:
    forks: int = 0
    top_ups: int = 0
    rounds: int = 0
    calls: int = 0


def released_rules(calls: Callable[[Key], bool], forks: Callable[[Key], bool], roots: int = ROOTS) -> Tally:
    """One tree.  ``calls``: the slot's next segment ends in a tool call; ``forks``: the coin after it."""
    tally, live = Tally(), [Slot((number,)) for number in range(roots)]
    while True:
        used = roots + tally.forks + tally.top_ups
        if not live:
            if used == LEAVES:
                return tally
            tally.top_ups += 1
            live = [Slot((roots + tally.top_ups - 1,))]
            continue
        tally.rounds += 1
        live = [slot for slot in live if calls(slot.key) and slot.calls < LIMIT]
        for slot in list(live):
            slot.calls += 1
            tally.calls += 1
        for slot in list(live):
            if forks(slot.key) and roots + tally.forks + tally.top_ups < LEAVES:
                live.append(Slot((*slot.key, slot.forked), slot.calls))
                slot.forked += 1
                tally.forks += 1


@pytest.mark.parametrize("p_call", RELEASED)
def test_the_grower_in_rounds_does_what_the_rules_do(p_call: float) -> None:
    """Every tree, on the same draws: the same forks, top-ups, rounds and calls."""
    habits = agent(p_call, tokens=20, sigma=0.0)
    scenario = Scenario(habits, Lognormal(1.0, 1.0), LEAVES, ROOTS, LIMIT, trees=1)
    for seed in range(15):
        tree_seed = int(np.random.SeedSequence((seed, 0)).generate_state(1)[0])  # as the training loop does
        streams: dict[Key, tuple[np.random.Generator, np.random.Generator]] = {}

        def draws(key: Key, seed: int = tree_seed, streams=streams) -> tuple[np.random.Generator, ...]:
            if key not in streams:  # as the rollout makes them: decisions, then sampling seeds
                made = (np.random.SeedSequence([seed, i], spawn_key=key) for i in (0, 1))
                first, second = map(np.random.default_rng, made)
                streams[key] = (first, second)
            return streams[key]

        expected = released_rules(
            calls=lambda key: habits.speak(int(draws(key)[1].integers(2**31)), "", ()).call > 0,
            forks=lambda key: draws(key)[0].random() <= 0.5,
        )
        ours = grow(scenario, WAYS["lockstep"], 1, seed)
        forks, top_ups, calls = (
            int(ours.result.per_tree(what))  # its only one
            for what in ("forks", "top_ups", "tool_calls")
        )
        assert expected == Tally(forks, top_ups, ours.rounds, calls)


@pytest.mark.parametrize("p_call", RELEASED)
def test_the_rules_give_the_known_figures(p_call: float) -> None:
    """Forks, top-ups and the ratio of tool calls within 0.05; rounds, known to one decimal, within 0.1."""
    rng, trees = random.Random(0), 20_000
    trees_grown = [
        released_rules(lambda key: rng.random() < p_call, lambda key: rng.random() <= 0.5)
        for _ in range(trees)
    ]
    plain = np.minimum(np.random.default_rng(0).geometric(1 - p_call, (trees, LEAVES)) - 1, LIMIT)
    forks, top_ups, rounds, plain_rounds, ratio = RELEASED[p_call]
    assert np.mean([t.forks for t in trees_grown]) == pytest.approx(forks, abs=0.05)
    assert np.mean([t.top_ups for t in trees_grown]) == pytest.approx(top_ups, abs=0.05)
    assert np.mean([t.rounds for t in trees_grown]) == pytest.approx(rounds, abs=0.1)
    assert np.mean(plain.max(axis=1) + 1) == pytest.approx(plain_rounds, abs=0.1)
    calls = np.mean([t.calls for t in trees_grown]) / plain.sum(axis=1).mean()
    assert calls == pytest.approx(ratio, abs=0.05)
