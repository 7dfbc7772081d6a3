"""``espalier bench eager``: its figures, on less work, and what it is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from system.bench.eager import cases, mean_ratio, run
from system.bench.growth import Scenario, agent
from system.errors import ConfigError
from system.twin.dist import Lognormal


def test_a_case_counts_forks_by_what_the_policy_asked_for() -> None:
    row = next(cases(Scenario(agent(), Lognormal(2.0), trees=4), batches=2, seeds=2))
    ours, theirs = row["eager_trees_per_h"], row["linear_trees_per_h"]
    assert row["ratio"] == pytest.approx([one / two for one, two in zip(ours, theirs, strict=True)])
    assert 0.3 < row["fork_share"] <= 0.5  # n - N of n leaves are kept for forks
    assert 0.5 < row["said_yes"] < 1.0
    assert row["tool_calls_ratio"] < 1.0


def test_ratios_are_averaged_as_ratios() -> None:
    assert mean_ratio([0.5, 2.0]) == "1.00 ± 0.69"
    assert mean_ratio([1.25]) == "1.25"


@pytest.mark.parametrize("words", [["0"], ["-1"], ["x"], ["1", "2"]])
def test_anything_but_a_number_of_seeds_is_refused(tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(ConfigError, match="one number of seeds, 1 or more"):
        run(tmp_path, words)
