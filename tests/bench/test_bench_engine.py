"""The figures of ``espalier bench engine`` from known samples."""

from __future__ import annotations

import pytest

from system.bench.engine import Speed, summary


def sample(ours: float, rival: float) -> dict[str, Speed]:
    speeds = {"ours_mixed": ours, "generate_batch": rival, "ours_equal": 20.0, "static": 10.0}
    return {name: Speed(value, value / 2) for name, value in speeds.items()}


def test_the_verdict_is_on_the_median_of_ratios_within_rounds() -> None:
    found = summary([sample(60.0, 10.0), sample(40.0, 10.0), sample(30.0, 5.0)])
    assert found["ratio"] == pytest.approx({"generate_batch": 6.0, "static": 2.0})
    assert found["ratio_of_best"] == pytest.approx({"generate_batch": 6.0, "static": 2.0})
    assert found["passed"]
    disturbed = summary([sample(60.0, 10.0), sample(40.0, 10.0), sample(45.0, 10.0)])
    assert disturbed["ratio"]["generate_batch"] == pytest.approx(4.5)
    assert disturbed["ratio_of_best"]["generate_batch"] == pytest.approx(6.0)
    assert not disturbed["passed"]
