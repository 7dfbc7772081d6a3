"""What barriers cost on the virtual clock: the claims of ``espalier bench schedules``, on less work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from system.bench.latency import ToolLatency
from system.bench.schedules import Mode, World, agent, grow

WORLD = World(agent(), ToolLatency(2.0), trees=8)
ROUNDS, FREE = (Mode(schedule, schedule, "arpo", 0) for schedule in ("lockstep", "barrier-free"))


def test_three_times_the_trees_per_hour_at_sigma_1_with_stragglers() -> None:
    """Barrier-free growth as it is by default, with η = 1; even in synchronous training it is twice."""
    world = replace(WORLD, latency=ToolLatency(2.0, 1.0, 0.05))
    rounds, synchronous, free = (grow(world, mode, 4) for mode in (ROUNDS, FREE, replace(FREE, staleness=1)))
    assert len(free.trees) == len(rounds.trees) == 32
    assert rounds.makespan_s / synchronous.makespan_s >= 2.0
    assert rounds.makespan_s / free.makespan_s >= 3.0


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_with_room_in_the_engine_a_batch_takes_as_long_as_its_longest_chain(sigma: float) -> None:
    world = replace(WORLD, latency=ToolLatency(2.0, sigma, 0.05))
    one = grow(world, FREE, 1)
    assert 1.0 - 1e-9 <= one.makespan_s / one.bound_s(world.slots) <= 1.05


def test_a_full_engine_works_almost_at_capacity() -> None:
    world = replace(WORLD, slots=2)
    one = grow(world, FREE, 1)
    assert one.work_s / world.slots > 5 * one.critical_path_s
    assert one.makespan_s / one.bound_s(world.slots) <= 1.05


def test_when_nothing_spreads_linear_rollouts_lose_nothing_in_rounds() -> None:
    """Constant tools, equal segments, room for all: everybody arrives at once."""
    world = replace(WORLD, agent=agent(sigma=0.0), slots=2**20)
    linear = [grow(world, replace(mode, branching="none"), 1).makespan_s for mode in (ROUNDS, FREE)]
    assert linear[0] == pytest.approx(linear[1])


def test_drained_updates_make_every_tree_of_one_batch_start_after_the_one_before() -> None:
    world = replace(WORLD, latency=ToolLatency(2.0, 1.0, 0.05), trees=4)
    free, drained = (
        grow(world, replace(FREE, branching="none", staleness=1, drained=drained), 4).makespan_s
        for drained in (False, True)
    )
    assert free < drained
