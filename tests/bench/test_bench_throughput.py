"""The throughput benchmark's parts: the slow search server, the figures of a run, the report."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from system.bench.latency import ToolLatency

from actors.throughput import MODES, SlowSearch, _config, _figures
from system.bench.schedules import Mode, World, agent, grow
from system.bench.throughput import write_report
from system.tasks.registry import make_task
from system.tools.serving import serve


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_a_valid_configuration(mode: str, tmp_path: Path) -> None:
    config = _config(MODES[mode], tmp_path, "http://127.0.0.1:1")
    assert config.rollout.schedule == ("lockstep" if mode == "lockstep" else "barrier-free")
    assert (config.branching.name == "none") == mode.startswith("linear")


async def test_the_slow_search_takes_as_long_as_its_query_draws() -> None:
    search = SlowSearch(make_task(_config((), Path("unused"), "")))  # type: ignore[arg-type]
    server = await serve(search.app)
    try:
        async with aiohttp.ClientSession() as session:

            async def seconds() -> float:
                began = time.monotonic()
                async with session.post(f"{server.url}/search", json={"query": "Bob"}) as answer:
                    assert answer.status == 200
                    assert "results" in await answer.json()
                return time.monotonic() - began

            search.latency = ToolLatency(0.4)
            assert await seconds() >= 0.4
            search.latency = ToolLatency(0.01, stragglers=1.0, straggler_factor=50.0)
            assert await seconds() >= 0.5
    finally:
        await server.close()


def test_figures_of_a_run() -> None:
    trees = grow(World(agent(), ToolLatency(), trees=2), Mode("", "barrier-free", "arpo", 0), 1).trees
    late = [replace(tree, started_s=0.0, closed_s=2.0 + 8.0 * i) for i, tree in enumerate(trees)]
    sampled = sum(int(np.count_nonzero(tree.version >= 0)) for tree in trees)
    summary = {
        "tokens": {"trained": sampled // 2, "generated": sampled + 7},
        "idle_s": {"learner": {"no batch": 5.0}},
        "staleness": {"mean": 0.5, "max": 1},
        "leaves": 32,
        "dropped": {},
    }
    engine = ({"idle_waiting_s": 3.0, "tokens": 1.0}, {"idle_waiting_s": 8.0, "tokens": 9.0})
    figures = _figures(summary, late, *engine, wall_s=20.0, trained_s=10.0)
    assert figures["engine_idle"] == {"waiting": 0.25}
    assert figures["learner_idle"] == {"no batch": 0.25}
    assert figures["trained_per_s"] == sampled // 2 / 10.0
    assert figures["trees_per_h"] == 2 / 10.0 * 3600
    assert figures["goodput"] == pytest.approx(0.5, abs=0.01)  # queued trees are not waste
    assert (figures["tree_s_median"], figures["tree_s_max"]) == (6.0, 10.0)


def test_the_report_compares_with_the_first_mode(tmp_path: Path) -> None:
    row = {
        "latency": "constant",
        **dict.fromkeys(("trained_per_s", "goodput", "staleness_mean", "staleness_max"), 1.0),
        **dict.fromkeys(("tree_s_median", "tree_s_p95", "tree_s_max", "tool_calls"), 2.0),
        "engine_idle": {"waiting": 0.9},
        "learner_idle": {},
    }
    runs = [{**row, "mode": "lockstep", "trees_per_h": 10.0}, {**row, "mode": "tree", "trees_per_h": 34.0}]
    write_report({"runs": runs, "settings": ["a=1"], "modes": {"lockstep": [], "tree": ["b=2"]}}, tmp_path)
    page = (tmp_path / "throughput.html").read_text()
    assert "34 (× 3.40)" in page
    assert "90%" in page
    assert json.loads((tmp_path / "throughput.json").read_text())["runs"][1]["trees_per_h"] == 34.0
    assert (tmp_path / "throughput.png").stat().st_size > 1000
