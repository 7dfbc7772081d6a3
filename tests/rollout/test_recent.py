"""The last numbers of a stream: ranks and medians as by their definitions."""

from __future__ import annotations

import statistics

from hypothesis import given
from hypothesis import strategies as st

from system.rollout.recent import Recent

NUMBERS = st.floats(-3, 3).map(lambda value: round(value, 1))  # with ties


@given(values=st.lists(NUMBERS, min_size=1, max_size=40), window=st.integers(1, 12), other=NUMBERS)
def test_ranks_and_medians_are_those_of_the_last_numbers(
    values: list[float], window: int, other: float
) -> None:
    recent = Recent()
    for value in values:
        recent.add(value, window)
    last = values[-window:]
    assert len(recent) == len(last)
    assert recent.median == statistics.median(last)
    below, equal = sum(one < other for one in last), sum(one == other for one in last)
    assert recent.rank(other) == (below + equal / 2) / len(last)
