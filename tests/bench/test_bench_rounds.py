"""Ways compared round by round: their order, and what ratios come to."""

from __future__ import annotations

import pytest

from system.bench.rounds import checked, in_turn, mean_ratio, together
from system.errors import ConfigError


def test_each_way_comes_first_in_turn() -> None:
    assert [in_turn("abc", number) for number in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]
    assert in_turn("", 1) == []


def test_ratios_are_averaged_as_ratios() -> None:
    assert mean_ratio([1.0, 1.1, 1.21]) == "1.10 (0.87 to 1.39)"
    assert mean_ratio([1.25]) == "1.25"


def test_a_long_run_counts_for_more_than_a_short_one() -> None:
    assert together([(100.0, 3.0), (300.0, 1.0)]) == 150.0


def test_no_round_is_refused() -> None:
    with pytest.raises(ConfigError, match="--rounds 0: 1 or more"):
        checked(0)
