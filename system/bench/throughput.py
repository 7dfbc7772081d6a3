"""``espalier bench throughput``: whole runs side by side, the same model, tools and prompts under every way.

Each run is an ``espalier train`` of its own on this machine.  A first one teaches a new model to call its
tools; the learner's step size in the others is so small that its weights stay those, so every run meets the
same agent.  The search tool answers after a drawn latency that follows from the query alone.  A run trains a
few batches; its records without the first step give trained tokens per second, trees per hour, goodput, what
engine and learner waited for, staleness, and the tail of tree completion.
"""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from system.bench.baselines import WAYS, Way
from system.bench.processes import run_to_end
from system.bench.report import Report, against
from system.bench.slow_search import slowed
from system.errors import ConfigError
from system.observe.rundir import RunDir
from system.serving import serve
from system.tasks.base import HasCorpus, make_task
from system.tools.search_index import Document, SearchIndex
from system.tools.search_server import create_app
from system.tree.record import Tree
from system.tree.store import read_trees
from system.twin.dist import Lognormal
from system.twin.records import Figures, Records, steps_of, total

MEAN_S = 0.1  # of a tool call without stragglers; everything else is as small as the model
SKIP = 1  # training steps at the start that are not measured
RUN_S = 1800.0  # at most, of one run

SETTINGS = (
    f"run.steps={SKIP + 6}",  # of an asynchronous run's last batches the slowest trees are never seen
    "task.train_size=512",
    "warmstart.steps=0",
    "rollout.concurrency=64",
    "tools.cache_size=0",  # or prompts would find the answers of earlier ones
    "tools.concurrency=512",
    "tools.deadline_s=60",
    "learn.tp=1",
    "learn.lr=1e-12",
    "learn.weight_decay=0",
    "eval.questions=1",
    "checkpoint.every=0",
    "observe.wandb=disabled",
    "observe.trees=-1",
)
TEACH = ("run.name=warm-start", "run.steps=1", "warmstart.steps=150", "warmstart.demos=1024")
QUICK_WAYS = ("lockstep", "tree async η=1")


class SlowSearch:
    """The search server, whose answers come after a latency that can be changed between runs."""

    def __init__(self, task: HasCorpus) -> None:
        self.latency = Lognormal(MEAN_S)
        index = SearchIndex.build(Document(**row) for row in task.corpus())
        self.app = slowed(create_app(index), self._seconds)

    def _seconds(self, query: bytes) -> float:
        return self.latency.draw(np.random.default_rng(zlib.crc32(query)))


def run(out_dir: Path, words: Sequence[str] = (), quick: bool = False) -> dict[str, Any]:
    """Measure, write ``throughput.json``, plots and ``throughput.html``; returns what the JSON holds.

    ``words``: names of the ways to run, the first of which the others are compared with; none: all.
    ``quick`` makes one run of each, of two ways if none is named.  The runs' directories are left in
    ``out_dir``.  Raises :class:`ConfigError` for an unknown way.
    """
    if unknown := [word for word in words if word not in WAYS]:
        raise ConfigError(f"bench throughput: no way {', '.join(unknown)}; there are: {', '.join(WAYS)}")
    names = words or (QUICK_WAYS if quick else tuple(WAYS))
    return write_report(asyncio.run(_measure(out_dir, {name: WAYS[name] for name in names}, quick)), out_dir)


def latencies(quick: bool) -> list[Lognormal]:
    late = Lognormal(MEAN_S, 1.0, 0.05)
    return [late] if quick else [*(Lognormal(MEAN_S, sigma) for sigma in (0.0, 0.5, 1.0, 1.5)), late]


async def _measure(out_dir: Path, ways: Mapping[str, Way], quick: bool) -> dict[str, Any]:
    task = make_task(WAYS["lockstep"].config(*SETTINGS))
    assert isinstance(task, HasCorpus)
    search = SlowSearch(task)
    server = await serve(search.app)
    runs = out_dir / time.strftime("runs-%Y%m%d-%H%M%S")
    runs.mkdir(parents=True)
    settings = [*SETTINGS, f"run.dir={runs}", f"tools.search_url={server.url}"]
    settings += ["run.steps=3"] if quick else []
    rows: list[dict[str, Any]] = []
    try:
        taught = await _train(runs, "warm-start", WAYS["tree sync"], [*settings, *TEACH])
        settings.append(f"model.path={taught.model}")
        for search.latency in latencies(quick):
            for name, way in ways.items():
                one = await _train(runs, f"{len(rows) + 1:02d}-{way.recipe}", way, settings)
                summary = json.loads(one.summary_path.read_bytes())
                row = figures(steps_of(one, SKIP), summary, list(read_trees(one.trees)))
                rows.append({"way": name, "latency": str(search.latency), **row})
                print(f"{search.latency}: {name}: {row['trained_per_s']:.0f} trained tokens/s", flush=True)
    finally:
        await server.close()
    shown = {name: [str(way.path), *way.overrides] for name, way in ways.items()}
    return {"runs": rows, "settings": list(SETTINGS), "ways": shown}


async def _train(runs: Path, name: str, way: Way, settings: Sequence[str]) -> RunDir:
    """One ``espalier train``, to its end.  Raises RuntimeError if it fails, TimeoutError after ``RUN_S``."""
    command = ["actors.cli.main", "train", str(way.path), *settings, *way.overrides, f"run.name={name}"]
    await run_to_end(*command, log=runs / f"{name}.log", limit_s=RUN_S)
    return RunDir.open(runs / name)


def figures(records: Records, summary: Mapping[str, Any], trees: Sequence[Tree]) -> dict[str, Any]:
    """``records``: of the steps measured; ``trees``: all that the run trained on."""
    found, span = Figures.of(records), total(records, "time/window_s")
    seconds = np.array([tree.closed_s - tree.started_s for tree in trees])
    sampled = sum(int((tree.version >= 0).sum()) for tree in trees)
    dropped = summary["tokens"]["generated"] - sampled if summary["dropped"] else 0
    return {
        "trained_per_s": found.trained_per_s,
        "trees_per_h": total(records, "train/trees") / span * 3600,
        "goodput": summary["tokens"]["trained"] / max(sampled + dropped, 1),
        "engine_idle": found.idle.get("engine-0", {}),
        "learner_idle": found.idle.get("learner", {}),
        "staleness_mean": found.staleness_mean,
        "staleness_max": max(one["flow/staleness_max"] for one in records),
        "tree_s_median": float(np.median(seconds)),
        "tree_s_p95": float(np.quantile(seconds, 0.95)),
        "tree_s_max": float(seconds.max()),
        "trees": len(trees),
        "tool_calls": sum(len(tree.calls) for tree in trees),
        "dropped": summary["dropped"],
    }


def write_report(result: dict[str, Any], out_dir: Path) -> dict[str, Any]:
    """``result``: ``runs``, the figures of each; ``ways``, how they were started; ``settings`` of all."""
    rows = result["runs"]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    spreads = list(dict.fromkeys(row["latency"] for row in rows))
    found = {(row["latency"], row["way"]): row for row in rows}
    report = Report(
        out_dir,
        "throughput",
        "Training throughput by the spread of tool latencies",
        "Real runs on this machine: the same model, engine, learner, tools and prompts; only the way to run "
        "differs.",
    )
    report.section(
        "Throughput",
        f"In brackets: against {ways[0]}. A run ends with its last training step; what an "
        "asynchronous one has begun for the next is cut off: a short run flatters it by its slowest trees.",
    )
    for key, title in (
        ("trained_per_s", f"Trained tokens per second (× {ways[0]})"),
        ("trees_per_h", f"Trees trained on per hour (× {ways[0]})"),
    ):
        report.table(
            title,
            ["tool latency", *ways],
            [
                [spread, *(against(found[spread, way][key], found[spread, ways[0]][key]) for way in ways)]
                for spread in spreads
            ],
        )
    report.figure("throughput", _plot(found, spreads, ways), "Trees trained on per hour")
    report.section("Where the time goes")
    for actor in ("engine", "learner"):
        causes = sorted({cause for row in rows for cause in row[f"{actor}_idle"]})
        report.table(
            f"{actor}: share of the time spent waiting, by cause",
            ["tool latency", "way", *causes],
            [
                [row["latency"], row["way"], *(f"{row[f'{actor}_idle'].get(c, 0.0):.0%}" for c in causes)]
                for row in rows
            ],
        )
    report.section("Staleness, waste and tails")
    report.table(
        "Staleness, goodput, seconds from a tree's first root to its close",
        ["tool latency", "way", "staleness", "max", "goodput", "tree s", "p95", "max s", "tool calls"],
        [
            [
                row["latency"],
                row["way"],
                *(row[key] for key in ("staleness_mean", "staleness_max")),
                f"{row['goodput']:.0%}",
                *(row[key] for key in ("tree_s_median", "tree_s_p95", "tree_s_max", "tool_calls")),
            ]
            for row in rows
        ],
        note="staleness: versions, of the oldest token; goodput: trained tokens / tokens of the trees that "
        "were trained on or dropped",
    )
    report.section("Settings")
    report.facts({way: " ".join(words) for way, words in result["ways"].items()})
    report.facts({"all": " ".join(result["settings"])})
    return report.finish(result)


def _plot(found: dict[tuple[str, str], dict[str, Any]], spreads: list[str], ways: list[str]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(ways)
    for number, way in enumerate(ways):
        places = np.arange(len(spreads)) + number * width
        axes.bar(places, [found[spread, way]["trees_per_h"] for spread in spreads], width, label=way)
    axes.set_xticks(np.arange(len(spreads)) + 0.4 - width / 2, spreads)
    axes.set_ylabel("trees per hour")
    axes.legend(fontsize="x-small")
    return figure
