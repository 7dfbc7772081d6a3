"""The throughput benchmark's parts: the slow search server, the figures of a run, the report."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from system.bench.baselines import BASELINES, WAYS
from system.bench.throughput import SETTINGS, TEACH, SlowSearch, figures, run, write_report
from system.config import load
from system.errors import ConfigError
from system.flow.replay import TreeInFlight
from system.serving import serve
from system.tasks.base import make_task
from system.tree.record import Tree
from system.twin.clock import run as virtually
from system.twin.dist import Lognormal
from system.twin.speeds import LinearEngine, LinearLearner
from system.twin.world import Models, Twin


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_a_valid_configuration(way: str) -> None:
    config = WAYS[way].config(*SETTINGS, *TEACH)
    named = [schedule for schedule in ("lockstep", "eager") if schedule in way]
    assert config.rollout.schedule == (named[0] if named else "barrier-free")
    assert (config.branching.name == "none") == way.startswith("linear")


def test_every_baseline_is_a_recipe_that_says_how_it_is_written_as_overrides() -> None:
    files = sorted(BASELINES.glob("*.yaml"))
    assert {path.stem for path in files} == {way.recipe for way in WAYS.values()}
    for path in files:
        heading = path.read_text().partition("base:")[0].replace("\n#", "")
        words = heading.partition("On any recipe:")[2].replace("(the defaults)", "").split()
        assert load(path) == load(BASELINES.parent / "quickstart.yaml", words), path


async def test_the_slow_search_takes_as_long_as_its_query_draws() -> None:
    search = SlowSearch(make_task(WAYS["tree sync"].config(*SETTINGS)))  # type: ignore[arg-type]
    server = await serve(search.app)
    try:
        async with aiohttp.ClientSession() as session:

            async def seconds() -> float:
                began = time.monotonic()
                async with session.post(f"{server.url}/search", json={"query": "Bob"}) as answer:
                    assert answer.status == 200
                    assert "results" in await answer.json()
                return time.monotonic() - began

            search.latency = Lognormal(0.4)
            assert await seconds() >= 0.4
            search.latency = Lognormal(0.01, stragglers=1.0, straggler_factor=50.0)
            assert await seconds() >= 0.5
    finally:
        await server.close()


def test_figures_of_a_run() -> None:
    twin = Twin(
        WAYS["tree sync"].config("flow.batch_leaves=16"),
        Models(LinearEngine(0.01, 0.0), LinearLearner(1.0, 0.0)),
        1,
    )
    trees: list[Tree] = []
    train = twin.train

    async def keeping(version: int, batch: Sequence[TreeInFlight]) -> Mapping[str, float]:
        trees.extend(tree.reference for tree in batch)
        return await train(version, batch)

    twin.train = keeping
    virtually(twin.run())
    late = [replace(tree, started_s=0.0, closed_s=2.0 + 8.0 * i) for i, tree in enumerate(trees)]
    sampled = sum(int(np.count_nonzero(tree.version >= 0)) for tree in trees)
    summary = {"tokens": {"trained": sampled // 2, "generated": sampled + 7}, "dropped": {}}
    step = {
        "time/window_s": 5.0,
        "train/tokens": sampled // 2 / 2,
        "train/trees": 1.0,
        "flow/staleness": 0.5,
        "flow/staleness_max": 1.0,
        "time/idle_s/engine-0/waiting": 1.25,
        "time/idle_s/learner/no batch": 1.25,
    }
    found = figures([step, step], summary, late)
    assert found["engine_idle"] == {"waiting": 0.25}
    assert found["learner_idle"] == {"no batch": 0.25}
    assert found["trained_per_s"] == sampled // 2 / 10.0
    assert found["trees_per_h"] == 2 / 10.0 * 3600
    assert found["goodput"] == pytest.approx(0.5, abs=0.01)  # queued trees are not waste
    assert (found["tree_s_median"], found["tree_s_max"]) == (6.0, 10.0)
    assert (found["staleness_mean"], found["staleness_max"]) == (0.5, 1.0)


def test_the_report_compares_with_the_first_way(tmp_path: Path) -> None:
    row = {
        "latency": "constant",
        **dict.fromkeys(("trained_per_s", "goodput", "staleness_mean", "staleness_max"), 1.0),
        **dict.fromkeys(("tree_s_median", "tree_s_p95", "tree_s_max", "tool_calls"), 2.0),
        "engine_idle": {"waiting": 0.9},
        "learner_idle": {},
    }
    runs = [{**row, "way": "lockstep", "trees_per_h": 10.0}, {**row, "way": "tree", "trees_per_h": 34.0}]
    write_report({"runs": runs, "settings": ["a=1"], "ways": {"lockstep": [], "tree": ["b=2"]}}, tmp_path)
    page = (tmp_path / "throughput.html").read_text()
    assert "34 (× 3.40)" in page
    assert "90%" in page
    assert json.loads((tmp_path / "throughput.json").read_text())["runs"][1]["trees_per_h"] == 34.0
    assert (tmp_path / "throughput.png").stat().st_size > 1000


def test_an_unknown_way_is_told_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no way eager; there are: lockstep, tree sync, .*eager async η=1"):
        run(tmp_path, ["tree sync", "eager"])
