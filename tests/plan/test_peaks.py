"""The plan's memory of a learner rank is that of a real training step at real shapes, or up to 15 % more."""

from __future__ import annotations

import json

import pytest
from fake_peaks import CASES, FILE, Case, stage_peaks

from system.plan.memory import learner_memory

PEAKS: dict[str, int] = json.loads(FILE.read_text())


def test_every_model_recomputation_and_layout_is_there() -> None:
    assert {*PEAKS} == {case.name for case in CASES}
    assert {case.model for case in CASES} == {"qwen2.5-7b", "qwen3-14b", "qwen3-32b"}
    assert {case.recompute for case in CASES} == {"none", "selective", "full"}
    assert {case.pp for case in CASES} == {1, 2, 4} == {case.cp for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_plan_is_never_below_the_peak_and_at_most_15_percent_above(case: Case) -> None:
    """In 0.03 s: the peaks were measured before, and the test below holds them."""
    planned = learner_memory(case.shape, case.learn).total
    assert 1.0 <= planned / PEAKS[case.name] <= 1.15


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in (
        "qwen3-14b 18432 selective tp4 pp1", "qwen2.5-7b 11264 none tp2 pp2", "qwen3-32b 18432 full tp8 pp1",
        "qwen3-14b 18432 selective tp4 pp1 cp2", "qwen3-32b 18432 selective tp4 pp1 lora16",
    )], ids=lambda case: case.name,
)  # fmt: skip
def test_the_peaks_are_those_of_the_model_as_it_is(case: Case) -> None:
    """Measured again, and that layers add up: six take what two and four say."""
    layers = case.shape.layers // case.pp
    two, four, six = (stage_peaks(case, count) for count in (2, 4, 6))
    assert six == [b + (b - a) for a, b in zip(two, four, strict=True)]
    all_layers = [a + (layers - 2) * (b - a) // 2 for a, b in zip(two, four, strict=True)]
    assert max(all_layers) == PEAKS[case.name], "measure again: python tests/plan/fake_peaks.py"
