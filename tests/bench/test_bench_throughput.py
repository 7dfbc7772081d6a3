"""The throughput benchmark's parts: the slow search server, the figures of a run, the report."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from system.bench.baselines import BASELINES, WAYS
from system.bench.throughput import (
    SETTINGS,
    TEACH,
    SlowSearch,
    compared,
    figures,
    latencies,
    run,
    write_report,
)
from system.config import load
from system.errors import ConfigError
from system.flow.replay import TreeInFlight
from system.serving import serve
from system.tasks.base import make_task
from system.tree.record import Origin, Tree
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


def test_a_query_is_as_slow_in_every_way_of_a_round_and_drawn_anew_in_the_next() -> None:
    search = SlowSearch(make_task(WAYS["tree sync"].config(*SETTINGS)))  # type: ignore[arg-type]
    search.latency = Lognormal(1.0, 1.0)
    drawn: list[tuple[float, ...]] = []
    for search.round in range(3):
        first, other, again = (search.seconds(query) for query in (b"Bob", b"Eve", b"Bob"))
        assert first == again
        drawn.append((first, other))
    assert len({one for pair in drawn for one in pair}) == 6
    # The first round is what it was before there were several.
    assert drawn[0][0] == search.latency.draw(np.random.default_rng(zlib.crc32(b"Bob")))


def test_latencies_are_named_by_their_spread() -> None:
    assert [str(one) for one in latencies()] == ["constant", "σ = 0.5", "σ = 1", "σ = 1.5", "σ = 1, 5% × 30"]
    assert latencies(quick=True) == latencies()[-1:] == latencies(words="1+stragglers")
    assert [str(one) for one in latencies(words="0+stragglers, 2")] == ["constant, 5% × 30", "σ = 2"]
    for word in ("x", "-1", "1+", "1+late", "4", "nan"):
        with pytest.raises(ConfigError, match=r"--latency .*σ from 0 to 3"):
            latencies(words=word)


def test_figures_of_a_run() -> None:
    twin = Twin(
        WAYS["tree sync"].config("flow.batch_leaves=16"),
        Models(LinearEngine(0.01, 0.0), LinearLearner(1.0, 0.0)),
        1,
    )
    kept: list[Tree] = []
    train = twin.train

    async def keeping(version: int, trees: Sequence[TreeInFlight]) -> Mapping[str, float]:
        kept.extend(tree.reference for tree in trees)
        return await train(version, trees)

    twin.train = keeping
    virtually(twin.run())
    late = [replace(tree, started_s=0.0, closed_s=2.0 + 8.0 * i) for i, tree in enumerate(kept)]
    sampled = sum(int(np.count_nonzero(tree.version >= 0)) for tree in kept)
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
    assert found["window_s"] == 10.0
    assert found["generated"] == sampled
    leaves = sum(tree.n_leaves for tree in late)
    assert found["fork_share"] == sum((tree.origin == Origin.FORK).sum() for tree in late) / leaves > 0
    assert (found["tree_s_median"], found["tree_s_max"]) == (6.0, 10.0)
    assert (found["staleness_mean"], found["staleness_max"]) == (0.5, 1.0)


def row(way: str, number: int, trees_per_h: float, window_s: float = 1.0, noise: str = "") -> dict[str, Any]:
    return {
        "way": way,
        "round": number,
        "latency": "constant",
        "noise": noise,
        "trees_per_h": trees_per_h,
        "window_s": window_s,
        "trees": 10,
        "tool_calls": 30 if way == "tree" else 40,
        "generated": 100,
        "fork_share": 0.5,
        **dict.fromkeys(("trained_per_s", "goodput", "staleness_mean", "staleness_max"), 1.0),
        **dict.fromkeys(("tree_s_median", "tree_s_p95", "tree_s_max"), 2.0),
        **dict.fromkeys(("load", "foreign", "stolen"), 0.25),
        "engine_idle": {"waiting": 0.9},
        "learner_idle": {},
    }


def test_rounds_are_counted_together_and_compared_one_by_one() -> None:
    runs = [
        *(row("linear", 1, 10.0), row("tree", 1, 20.0)),
        *(row("tree", 2, 10.0, 3.0), row("linear", 2, 20.0, noise="others used 2 cores")),
    ]
    linear, tree = compared(runs, "linear")
    assert (linear["ratios"], linear["ratio"], linear["quiet"]) == ({}, None, None)
    assert (linear["trees_per_h"], tree["trees_per_h"]) == (15.0, 12.5)
    assert tree["ratios"] == {1: 2.0, 2: 0.5}
    assert (tree["noisy"], tree["quiet"]) == ([2], "2.00")
    assert tree["ratio"].startswith("1.00 (")
    assert (linear["tool_calls"], tree["tool_calls"], tree["generated"]) == (4.0, 3.0, 10.0)
    assert compared(runs[:-1], "linear")[1]["ratios"] == {1: 2.0}  # interrupted


def test_the_report_compares_with_the_first_way(tmp_path: Path) -> None:
    runs = [row("lockstep", 1, 10.0), row("tree", 1, 34.0)]
    ways = {"lockstep": [], "tree": ["b=2"], "never run": []}
    write_report({"runs": runs, "rounds": 1, "settings": ["a=1"], "ways": ways}, tmp_path)
    page = (tmp_path / "throughput.html").read_text()
    assert "34 (× 3.40)" in page
    assert "90%" in page
    written = json.loads((tmp_path / "throughput.json").read_text())
    assert written["runs"][1]["trees_per_h"] == 34.0
    assert written["comparison"][1]["ratio"] == "3.40"
    assert (tmp_path / "throughput.png").stat().st_size > 1000


def test_an_unknown_way_is_told_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no way eager; there are: lockstep, tree sync, .*eager async η=1"):
        run(tmp_path, ["tree sync", "eager"])


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"rounds": 0}, "--rounds 0"),
        ({"steps": 1}, "--steps 1: 2 or more"),
        ({"latency": "x"}, "--latency x"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, asked: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        run(tmp_path, **asked)
