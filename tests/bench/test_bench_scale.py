"""The scaling benchmark: its search finds the top, its simulations obey the hardware, causes are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from system.bench import scale, splits
from system.bench.splits import PROFILES, Profile, Split, TrainingLoad, best_split, simulate_split
from system.config import ConfigError

SMALL = TrainingLoad(batch_trees=4, leaves=8, roots=4, segment_tokens=512, result_tokens=128)
SEVEN = PROFILES["7B"]


def test_more_engines_are_never_slower_and_training_limits_what_they_bring() -> None:
    few, more, many = (simulate_split(SEVEN, gpus, 1, SMALL) for gpus in (5, 6, 68))
    assert few.learner_gpus == more.learner_gpus == many.learner_gpus == 4
    assert (few.engines, more.engines, many.engines) == (1, 2, 64)
    assert few.result.step_s > more.result.step_s > many.result.step_s
    assert many.learner_idle < few.learner_idle
    assert many.result.running < few.result.running


def test_the_same_point_is_the_same_simulation() -> None:
    first, again = (simulate_split(SEVEN, 8, 1, SMALL) for _ in range(2))
    assert first.result.digest == again.result.digest


def test_too_few_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="leave none for engines"):
        simulate_split(SEVEN, 4, 1, SMALL)
    assert best_split(PROFILES["32B"], 16, SMALL) == []


@pytest.mark.parametrize(("gpus", "top"), [(64, 3), (256, 21), (1024, 1), (1024, 255)])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_search_finds_the_best_split_in_few_simulations(
    gpus: int, top: int, tp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[int, int]] = []

    def fake(profile: Profile, gpus: int, replicas: int, work: TrainingLoad) -> Split:
        tried.append((profile.engine.tp, replicas))
        rate = min(replicas / top, (gpus / 4 - replicas) / (gpus / 4 - top))  # rises, then falls
        rate *= 1 - 0.1 * abs(profile.engine.tp.bit_length() - tp.bit_length())  # and so does this
        result: Any = SimpleNamespace(trained_per_s=rate)
        return Split(profile, gpus, 4 * replicas, 1, work, result)

    monkeypatch.setattr(splits, "simulate_split", fake)
    found = best_split(SEVEN, gpus, SMALL)
    assert found[0].profile.engine.tp == tp
    assert found[0].result.trained_per_s > 0.85  # of the top's 1
    assert len(found) == len(set(tried)) == len(tried) <= 45
    assert max(width for width, _ in tried) <= SEVEN.model.kv_heads == 4


def test_larger_engines_pay_where_branches_are_few() -> None:
    work = replace(SMALL, batch_trees=2)
    few = best_split(SEVEN, 128, work)[0]
    assert few.profile.engine.tp == 4
    same = simulate_split(SEVEN, 128, few.replicas, work)
    assert same.profile.engine.tp == 1
    assert few.result.tree_s["p50"] < 0.7 * same.result.tree_s["p50"]


def test_words_name_profiles_and_numbers_of_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'9B' is neither a model size \(7B, 14B, 32B\) nor a number"):
        scale.run(tmp_path, words=["9B"])
    for words in ([], ["64"]):  # nothing long begins before it is said what
        with pytest.raises(ConfigError, match=r"name a model size \(7B, 14B, 32B\).*espalier bench scale 7B"):
            scale.run(tmp_path, words=words)
    tiny = replace(SMALL, segment_tokens=128, call_limit=1)
    monkeypatch.setattr(scale, "TrainingLoad", lambda **_: tiny)
    data = scale.run(tmp_path, words=["16", "7B", "8"])
    assert [(p["profile"], p["gpus"]) for p in data["curves"]["7B"]] == [("7B", 8), ("7B", 16)]
    assert data["sweeps"].keys() == {"η", "n", "tool latency", "engine tp"}
    assert [p["engine_tp"] for p in data["sweeps"]["engine tp"]] == [1, 2, 4]
    page = (tmp_path / "scale.html").read_text()
    assert "7B on 16 GPUs: one setting at a time" in page
    assert (tmp_path / "splits.png").stat().st_size > 5_000


def point(learner_idle: float, engine_idle: float, running: float, staleness: int = 1) -> Split:
    result: Any = SimpleNamespace(
        idle={"learner": {"no batch": learner_idle}, "engine-0": {"waiting": engine_idle}}, running=running
    )
    return Split(SEVEN, 8, 4, 4, replace(SMALL, staleness=staleness), result)


def test_the_bottleneck_is_who_has_no_time_to_spare() -> None:
    assert point(0.02, 0.5, 10).bottleneck == "training"
    assert point(0.5, 0.02, 400).bottleneck == "generation"
    assert point(0.5, 0.02, 4).bottleneck == "few branches"  # engines step, but each for few sequences
    assert point(0.5, 0.5, 4).bottleneck == "few branches"
    assert point(0.5, 0.5, 4, staleness=0).bottleneck == "taking turns"
