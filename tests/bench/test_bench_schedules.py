"""What barriers cost on the virtual clock: the claims of ``espalier bench schedules``, on less work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from system.bench.baselines import WAYS
from system.bench.growth import Scenario, agent, grow
from system.twin.dist import Lognormal

SCENARIO = Scenario(agent(), Lognormal(2.0), trees=8)


def test_three_times_the_trees_per_hour_at_sigma_1_with_stragglers() -> None:
    """Barrier-free growth as it is by default, with η = 1; even in synchronous training it is twice."""
    case = replace(SCENARIO, latency=Lognormal(2.0, 1.0, 0.05), trees=16)
    ways = ("lockstep", "tree sync", "tree async η=1")
    rounds, synchronous, free = (grow(case, WAYS[way], 4).result for way in ways)
    assert free.steps == rounds.steps == 4
    assert rounds.seconds / synchronous.seconds >= 2.0
    assert rounds.seconds / free.seconds >= 3.0


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_with_room_in_the_engine_a_batch_takes_as_long_as_its_longest_chain(sigma: float) -> None:
    one = grow(replace(SCENARIO, latency=Lognormal(2.0, sigma, 0.05)), WAYS["tree sync"], 1)
    assert 1.0 - 1e-9 <= one.result.seconds / one.bound_s <= 1.05


def test_a_full_engine_works_almost_at_capacity() -> None:
    one = grow(replace(SCENARIO, slots=2), WAYS["tree sync"], 1)
    assert one.work_s / one.slots > 5 * one.critical_path_s
    assert one.result.seconds / one.bound_s <= 1.05


def test_when_nothing_spreads_linear_rollouts_lose_nothing_in_rounds() -> None:
    """Constant tools, equal segments, room for all: everybody arrives at once."""
    case = replace(SCENARIO, agent=agent(sigma=0.0), slots=2**20)
    rounds, free = (grow(case, WAYS[way], 1).result.seconds for way in ("linear lockstep", "linear sync"))
    assert rounds == pytest.approx(free)


def test_drained_updates_make_every_tree_of_one_batch_start_after_the_one_before() -> None:
    case = replace(SCENARIO, latency=Lognormal(2.0, 1.0, 0.05), trees=4)
    drained = WAYS["linear one-step-off"]
    free = replace(drained, overrides=("flow.update=in-flight",))
    assert grow(case, free, 4).result.seconds < grow(case, drained, 4).result.seconds
