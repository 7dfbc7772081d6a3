"""Rows that attend together: runs of like length, and when moving rows pays."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from system.engine.embedded.grouping import Regrouping, cost, regrouped, runs

lengths = st.lists(st.integers(1, 2000), min_size=1, max_size=130).map(
    lambda values: np.array(values, np.int64)
)


def moved(length: np.ndarray) -> np.ndarray:
    sources, targets = regrouped(length)
    after = length.copy()
    after[targets] = length[sources]
    return after


@settings(deadline=None)
@given(lengths)
def test_runs_cover_every_row_once(length: np.ndarray):
    cut = runs(length)
    assert [row for first, last in cut for row in range(first, last)] == list(range(length.size))


@settings(deadline=None)
@given(lengths)
def test_moves_permute_and_reach_the_cost_of_sorted_rows(length: np.ndarray):
    after = moved(length)
    assert sorted(after) == sorted(length)
    assert cost(after) == cost(np.sort(length)[::-1])


@settings(deadline=None)
@given(lengths)
def test_rows_already_in_their_run_stay(length: np.ndarray):
    sources, targets = regrouped(moved(length))
    assert sources.size == targets.size == 0


@settings(deadline=None)
@given(lengths)
def test_sorted_rows_are_the_cheapest_order(length: np.ndarray):
    assert cost(np.sort(length)[::-1]) <= cost(length)


def test_rows_move_once_waiting_has_cost_as_much_as_moving():
    regrouping = Regrouping()
    length = np.tile(
        np.array([400, 10], np.int64), 32
    )  # every run holds both: half of all reading is padding
    sources, _ = regrouped(length)
    price = 2 * int(length[sources].sum())
    wasted = cost(length) - cost(np.sort(length)[::-1])
    steps = 0
    while (moves := regrouping.due(length)) is None:
        steps += 1
    assert steps == -(-price // wasted) - 1
    length[moves[1]] = length[moves[0]]
    assert all(
        regrouping.due(length + step) is None for step in range(1000)
    )  # they grow alike: nothing to do


def test_few_rows_are_never_moved():
    regrouping = Regrouping()
    length = np.array([1, 1000] * 15, np.int64)
    assert all(regrouping.due(length) is None for _ in range(1000))


@settings(deadline=None)
@given(st.lists(st.tuples(lengths, st.integers(1, 4)), min_size=1, max_size=4))
def test_runs_of_rows_that_grow_and_change_are_those_computed_anew(phases: list[tuple[np.ndarray, int]]):
    regrouping = Regrouping()
    for length, steps in phases:
        for step in range(steps):
            assert regrouping.runs(length + step) == runs(length + step)
