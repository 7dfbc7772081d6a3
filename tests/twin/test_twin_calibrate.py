"""Calibration: known parts come back from records, and a calibrated twin predicts what it was not shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from twin_worlds import KeepingTwin, config, models

from system.bench.twin import run
from system.config import ConfigError
from system.observe.jsonl import JsonlWriter
from system.observe.rundir import RunDir
from system.tasks.tiny_model import tiny_config
from system.tree.store import TreeWriter
from system.twin.agent import AgentModel
from system.twin.calibrate import Calibration, fit_agent, fit_engine, fit_tools, nonnegative
from system.twin.clock import run as virtually
from system.twin.dist import Lognormal
from system.twin.speeds import LinearEngine, LinearLearner
from system.twin.tools import ToolModel
from system.twin.world import simulate

ENGINE = LinearEngine(0.008, 0.0005, per_prefill_s=2e-5)
WORLD = models(
    engine=ENGINE,
    learner=LinearLearner(0.4, 2e-4),
    agent=AgentModel(segment_tokens=Lognormal(30, 0.6), p_call=(0.9, 0.6, 0.3)),
    tools={"search": ToolModel(Lognormal(0.8, 0.7))},
    publish_s=0.2,
    update_s=0.05,
    request_s=0.015,
    mixed=True,
    vocab=512,
)


def engine_sums(rng: np.random.Generator) -> dict[str, float]:
    """What the embedded engine counts over some steps of ``ENGINE``'s speed."""
    rows, prefill = rng.integers(1, 30, 400), rng.integers(0, 60, 400) * (rng.random(400) < 0.3)
    seconds = ENGINE.step_fixed_s + ENGINE.per_sequence_s * rows + ENGINE.per_prefill_s * prefill
    sums = {
        "steps": rows.size, "row_steps": rows.sum(), "prefill_tokens": prefill.sum(), "busy_s": seconds.sum(),
        "moment_rr": rows @ rows, "moment_rp": rows @ prefill, "moment_pp": prefill @ prefill,
        "moment_rt": rows @ seconds, "moment_pt": prefill @ seconds,
    }  # fmt: skip
    return {f"engine/server/{name}": float(value) for name, value in sums.items()}


def record(tmp_path: Path, name: str, *overrides: str) -> RunDir:
    """A run directory of the known world under ``overrides``."""
    settings = config(f"run.dir={tmp_path}", f"run.name={name}", "observe.trees=-1", *overrides)
    directory = RunDir.create(settings, name)
    directory.write_config(settings)
    directory.start.mkdir(exist_ok=True)
    tiny_config(settings.model, WORLD.vocab).save_pretrained(directory.start)
    twin = KeepingTwin(settings, WORLD, 64)
    virtually(twin.run())
    log, trees = JsonlWriter(directory.metrics_path), TreeWriter(directory.trees)
    for one in twin.records:
        log.write({**one, **engine_sums(np.random.default_rng(one["step"]))})
    for tree in twin.trees:
        trees.append(tree)
    log.close()
    trees.flush()
    return directory


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The record that a twin is calibrated on, or compared with."""
    return record(tmp_path_factory.mktemp("twin"), "shown")


def test_least_squares_recovers_an_engine_exactly() -> None:
    records = [engine_sums(np.random.default_rng(seed)) for seed in range(5)]
    fitted = fit_engine(records)
    assert fitted.step_fixed_s == pytest.approx(ENGINE.step_fixed_s)
    assert fitted.per_sequence_s == pytest.approx(ENGINE.per_sequence_s)
    assert fitted.per_prefill_s == pytest.approx(ENGINE.per_prefill_s)


def test_a_run_without_engine_counters_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="no sums over the engine's steps"):
        fit_engine([{"time/window_s": 1.0}])


def test_no_coefficient_is_negative_and_the_rest_is_still_least_squares() -> None:
    x = np.column_stack([np.ones(5), np.arange(5.0)])
    y = np.array([5.0, 4.0, 4.0, 3.0, 2.0])  # falls: the slope would be negative
    assert nonnegative(x.T @ x, x.T @ y) == pytest.approx([y.mean(), 0.0])


def test_habits_and_tools_come_back_from_trees() -> None:
    twin = KeepingTwin(config("branching=none"), WORLD, 15)
    virtually(twin.run())
    agent = fit_agent(twin.trees, window=8)
    assert agent.tools == ["search"]
    for calls, p_call in enumerate((0.9, 0.6, 0.3)):
        heard = [agent.segments[number] for number in agent.levels[calls]]
        assert np.mean([one.tool == 0 for one in heard]) == pytest.approx(p_call, abs=0.15)
    assert agent.variety > 5  # branches are independent here
    lengths = [agent.segments[number].tokens for number in agent.levels[0]]
    assert np.mean(lengths) == pytest.approx(30, rel=0.15)
    tool = fit_tools(twin.trees, agent.tools)["search"]
    assert tool.latency.mean == pytest.approx(0.8, rel=0.2)
    assert tool.result_tokens.mean == pytest.approx(64, abs=1)


@pytest.mark.timeout(600)
def test_a_calibrated_twin_predicts_runs_it_has_not_seen(tmp_path: Path, shown: RunDir) -> None:
    others = [
        record(tmp_path, "synchronous", "flow.staleness=0"),
        record(tmp_path, "wide", "rollout.leaves=8", "rollout.roots=3", "flow.batch_leaves=32"),
    ]
    calibration = Calibration.from_run(shown)
    assert calibration.models.publish_s == pytest.approx(WORLD.publish_s, abs=0.02)
    assert calibration.models.update_s == pytest.approx(WORLD.update_s, abs=0.01)
    data: dict[str, Any] = run(
        tmp_path / "out", quick=True, words=[str(one.root) for one in (shown, *others)]
    )
    assert (tmp_path / "out" / "twin.html").is_file()
    assert [one["kind"] for one in data["runs"].values()] == ["fit", "prediction", "prediction"]
    for name, one in data["runs"].items():
        assert one["holds"], (name, one)
        assert one["twin"]["step_s"] == pytest.approx(one["measured"]["step_s"], rel=0.1)


def test_speeds_can_come_from_benchmark_figures(tmp_path: Path, shown: RunDir) -> None:
    sums = {key.rpartition("/")[2]: value for key, value in engine_sums(np.random.default_rng(0)).items()}
    steps = [{"tree_tokens": n, "tree_s": 0.4 + 2e-4 * n} for n in (1_000, 5_000, 20_000)]
    engine, learner = tmp_path / "engine.json", tmp_path / "learner.json"
    engine.write_text(json.dumps({"engine_sums": sums}))
    learner.write_text(json.dumps({"results": steps}))
    data: dict[str, Any] = run(
        tmp_path / "out", quick=True, words=[str(engine), str(learner), str(shown.root)]
    )
    (one,) = data["runs"].values()
    assert one["kind"] == "prediction"
    assert one["holds"], one
    engine.write_text("{}")
    with pytest.raises(ConfigError, match=r"engine\.json: no figures .* espalier bench engine"):
        run(tmp_path / "out", words=[str(engine), str(shown.root)])


def test_slower_tools_are_an_input_to_a_prediction(tmp_path: Path) -> None:
    settings = config()
    slow = replace(WORLD, tools={"search": ToolModel(Lognormal(4.0, 0.7))})
    quick, waiting = (simulate(settings, world, steps=6).seconds for world in (WORLD, slow))
    assert waiting > 1.5 * quick
