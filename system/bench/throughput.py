"""``espalier bench throughput``: whole runs side by side, the same model, tools and prompts under every way.

Each run is an ``espalier train`` of its own on this machine.  A first one teaches a new model to call its
tools; the learner's step size in the others is so small that its weights stay those, so every run meets the
same agent.  The search tool answers after a drawn latency that follows from the query and the round alone.  A
run trains a few batches; its records without the first step give trained tokens per second, trees per hour,
goodput, what engine and learner waited for, staleness, and the tail of tree completion.

Every way runs once per round and latency, in an order that shifts by one each round.  All runs ask the same
questions in the same order.  A query is as slow in one way as in the other of the same round, whenever and
however often it is asked, and another round draws anew.  So both ways meet a slow query in the same trees
wherever they ask the same of it; only what one way alone asks, because its model drew other tokens, it waits
for alone.
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
from system.bench.rounds import checked, in_turn, mean_ratio, together
from system.bench.slow_search import slowed
from system.bench.usage import MOST_FOREIGN, MOST_STEAL, Watch
from system.errors import ConfigError
from system.observe.jsonl import JsonlWriter
from system.observe.rundir import RunDir
from system.serving import serve
from system.tasks.base import HasCorpus, make_task
from system.tools.search_index import Document, SearchIndex
from system.tools.search_server import create_app
from system.tree.record import Origin, Tree
from system.tree.store import read_trees
from system.twin.dist import Lognormal
from system.twin.records import Figures, Records, steps_of, total

MEAN_S = 0.1  # of a tool call without stragglers; everything else is as small as the model
STRAGGLERS = 0.05
SKIP = 1  # training steps at the start that are not measured
STEPS, QUICK_STEPS = (
    SKIP + 6,
    SKIP + 2,
)  # of an asynchronous run's last batches the slowest trees are never seen
RUN_S = 1800.0  # at most, of one run

SETTINGS = (
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
        self.round = 0
        index = SearchIndex.build(Document(**row) for row in task.corpus())
        self.app = slowed(create_app(index), self.seconds)

    def seconds(self, query: bytes) -> float:
        """How long the server takes over the request ``query`` in this round."""
        return self.latency.draw(np.random.default_rng([zlib.crc32(query), self.round]))


def run(
    out_dir: Path,
    words: Sequence[str] = (),
    quick: bool = False,
    rounds: int = 1,
    latency: str = "",
    steps: int | None = None,
) -> dict[str, Any]:
    """Measure, write ``throughput.json``, plots and ``throughput.html``; returns what the JSON holds.

    ``words``: names of the ways to run, the first of which the others are compared with; none: all.
    ``latency``: see :func:`latencies`; ``steps``: training steps of a run.  ``quick`` makes short runs at one
    latency, of two ways if none is named.  The runs' directories are left in ``out_dir``.  Raises
    :class:`ConfigError` for what cannot be run; an interrupted measurement reports the runs until then.
    """
    if unknown := [word for word in words if word not in WAYS]:
        raise ConfigError(f"bench throughput: no way {', '.join(unknown)}; there are: {', '.join(WAYS)}")
    names = tuple(dict.fromkeys(words)) or (QUICK_WAYS if quick else tuple(WAYS))
    ways = {name: WAYS[name] for name in names}
    chosen = latencies(quick, latency)
    if steps is None:
        steps = QUICK_STEPS if quick else STEPS
    elif steps <= SKIP:
        raise ConfigError(f"--steps {steps}: {SKIP + 1} or more, of which the first does not count")
    rows: list[dict[str, Any]] = []
    shown = {name: [str(way.path), *way.overrides] for name, way in ways.items()}
    settings = [*SETTINGS, f"run.steps={steps}"]
    result: dict[str, Any] = {"runs": rows, "rounds": checked(rounds), "settings": settings, "ways": shown}
    try:
        asyncio.run(_measure(out_dir, ways, chosen, rounds, settings, rows))
    finally:
        if rows:
            write_report(result, out_dir)
    return result


def latencies(quick: bool = False, words: str = "") -> list[Lognormal]:
    """``words``: σ of each, with commas, those with stragglers marked so: ``0,1,1+stragglers``; none: all
    that are measured by default, ``quick`` the last of these.  Raises ConfigError.
    """
    usual = "1+stragglers" if quick else "0,0.5,1,1.5,1+stragglers"
    return [_latency(word.strip()) for word in dict.fromkeys((words or usual).split(","))]


def _latency(word: str) -> Lognormal:
    spread, plus, late = word.partition("+")
    try:
        sigma = float(spread)
    except ValueError:
        sigma = -1.0
    if not 0 <= sigma <= 3 or (plus and late != "stragglers"):
        raise ConfigError(f"--latency {word}: σ from 0 to 3, with or without stragglers, as 0,1,1+stragglers")
    return Lognormal(MEAN_S, sigma, STRAGGLERS if plus else 0.0)


async def _measure(
    out_dir: Path,
    ways: Mapping[str, Way],
    chosen: Sequence[Lognormal],
    rounds: int,
    settings: Sequence[str],
    rows: list[dict[str, Any]],
) -> None:
    """All runs; each puts its row into ``rows``, and into ``rows.jsonl`` beside its directory."""
    task = make_task(WAYS["lockstep"].config(*SETTINGS))
    assert isinstance(task, HasCorpus)
    search = SlowSearch(task)
    server = await serve(search.app)
    runs = out_dir / time.strftime("runs-%Y%m%d-%H%M%S")
    runs.mkdir(parents=True)
    kept = JsonlWriter(runs / "rows.jsonl")
    common = [*settings, f"run.dir={runs}", f"tools.search_url={server.url}"]
    try:
        taught = await _train(runs, "warm-start", WAYS["tree sync"], [*common, *TEACH])
        common.append(f"model.path={taught.model}")
        for search.round in range(rounds):
            for search.latency in chosen:
                for name in in_turn(list(ways), search.round):
                    where = {"way": name, "latency": str(search.latency), "round": search.round + 1}
                    label, watch = f"{len(rows) + 1:02d}-{ways[name].recipe}", Watch()
                    one = await _train(runs, label, ways[name], common, watch)
                    usage = watch.usage()
                    busy = {key: getattr(usage, key) for key in ("load", "stolen", "foreign", "noise")}
                    summary = json.loads(one.summary_path.read_bytes())
                    found = figures(steps_of(one, SKIP), summary, list(read_trees(one.trees)))
                    rows.append({**where, **found, **busy})
                    kept.write(rows[-1])
                    print(told(rows[-1]), flush=True)
    finally:
        kept.close()
        await server.close()


async def _train(
    runs: Path, name: str, way: Way, settings: Sequence[str], watch: Watch | None = None
) -> RunDir:
    """One ``espalier train``, to its end.  Raises RuntimeError if it fails, TimeoutError after ``RUN_S``."""
    command = ["actors.cli.main", "train", str(way.path), *settings, *way.overrides, f"run.name={name}"]
    started = watch.during if watch else None
    await run_to_end(*command, log=runs / f"{name}.log", limit_s=RUN_S, started=started)
    return RunDir.open(runs / name)


def told(row: Mapping[str, Any]) -> str:
    """A run in a line."""
    return (
        f"round {row['round']}, {row['latency']}: {row['way']}: {row['trained_per_s']:.0f} trained tokens/s, "
        f"{row['trees_per_h']:,.0f} trees/h; {row['noise'] or 'quiet'}"
    )


def figures(records: Records, summary: Mapping[str, Any], trees: Sequence[Tree]) -> dict[str, Any]:
    """``records``: of the steps measured; ``trees``: all that the run trained on.

    ``window_s``: seconds of these steps; ``generated``, ``tool_calls`` and ``fork_share`` (of the leaves) are
    of ``trees``.
    """
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
        "window_s": span,
        "trees": len(trees),
        "generated": sampled,
        "fork_share": sum(tree.origins(Origin.FORK) for tree in trees) / sum(tree.n_leaves for tree in trees),
        "tool_calls": sum(len(tree.calls) for tree in trees),
        "dropped": summary["dropped"],
    }


def write_report(result: dict[str, Any], out_dir: Path) -> dict[str, Any]:
    """``result``: ``runs``, the figures of each; ``ways``, how they were started; ``settings`` of all.

    ``comparison`` is added to it: see :func:`compared`.
    """
    rows, ways = result["runs"], list(result["ways"])
    spreads = list(dict.fromkeys(row["latency"] for row in rows))
    found = compared(rows, ways[0])
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
    cells = {(one["latency"], one["way"]): one for one in found}
    for key, title in (
        ("trained_per_s", f"Trained tokens per second (× {ways[0]})"),
        ("trees_per_h", f"Trees trained on per hour (× {ways[0]})"),
    ):
        report.table(
            title,
            ["tool latency", *ways],
            [[spread, *(_against(cells, spread, way, ways[0], key) for way in ways)] for spread in spreads],
            note="all rounds together" if result["rounds"] > 1 else "",
        )
    report.figure("throughput", _plot(cells, spreads, ways), "Trees trained on per hour")
    report.table(
        "Work per tree" + (f", and trees per hour against {ways[0]} round by round" * (len(ways) > 1)),
        [
            "tool latency",
            "way",
            "tool calls",
            "generated tokens",
            "leaves that are forks",
            "ratios",
            "mean",
            "of quiet rounds",
        ],
        [
            [
                one["latency"],
                one["way"],
                one["tool_calls"],
                one["generated"],
                f"{one['fork_share']:.0%}",
                ", ".join(
                    f"{ratio:.2f}{'*' * (number in one['noisy'])}" for number, ratio in one["ratios"].items()
                )
                or None,
                one["ratio"],
                one["quiet"],
            ]
            for one in found
        ],
        note="mean: geometric, with its 95 % interval by Student's t over the rounds. In a round a query is "
        f"as slow in one way as in the others. *: in one of the two runs more than {MOST_STEAL:.0%} of the "
        f"processors' time was stolen, or others used more than {MOST_FOREIGN:g} cores.",
    )
    report.section("Where the time goes")
    for actor in ("engine", "learner"):
        causes = sorted({cause for row in rows for cause in row[f"{actor}_idle"]})
        report.table(
            f"{actor}: share of the time spent waiting, by cause",
            ["tool latency", "round", "way", *causes],
            [
                [
                    *(row[key] for key in ("latency", "round", "way")),
                    *(f"{row[f'{actor}_idle'].get(cause, 0.0):.0%}" for cause in causes),
                ]
                for row in rows
            ],
        )
    report.section("Staleness, waste, tails and noise")
    report.table(
        "Staleness, goodput, seconds from a tree's first root to its close, what others did meanwhile",
        ["tool latency", "round", "way", "staleness", "max", "goodput", "measured s", "tree s", "p95",
         "max s", "load before", "cores of others", "stolen"],
        [
            [
                *(row[key] for key in ("latency", "round", "way", "staleness_mean", "staleness_max")),
                f"{row['goodput']:.0%}",
                *(row[key] for key in ("window_s", "tree_s_median", "tree_s_p95", "tree_s_max")),
                f"{row['load']:.1f}",
                f"{row['foreign']:.2f}",
                f"{row['stolen']:.1%}",
            ]
            for row in rows
        ],
        note="staleness: versions, of the oldest token; goodput: trained tokens / tokens of the trees that "
        "were trained on or dropped",
    )  # fmt: skip
    report.section("Settings")
    report.facts({way: " ".join(words) for way, words in result["ways"].items()})
    report.facts({"all": " ".join(result["settings"])})
    return report.finish({**result, "comparison": found})


def compared(rows: Sequence[Mapping[str, Any]], base: str) -> list[dict[str, Any]]:
    """By latency and way, all rounds together: rates, work per tree, and trees per hour against ``base``.

    ``ratios``: in the same round, of rounds in which an interrupted measurement has both; ``noisy``: those of
    them in which one of the two runs was not quiet; ``ratio`` and ``quiet``: the mean, with them and without.
    """
    cells: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["latency"], row["way"]), {})[row["round"]] = row
    found: list[dict[str, Any]] = []
    for (latency, way), mine in cells.items():
        its, other = list(mine.values()), cells.get((latency, base), {})
        trees = sum(row["trees"] for row in its)
        shared = [number for number in mine if number in other and way != base]
        ratios = {number: mine[number]["trees_per_h"] / other[number]["trees_per_h"] for number in shared}
        noisy = [number for number in shared if mine[number]["noise"] or other[number]["noise"]]
        quiet = [ratio for number, ratio in ratios.items() if number not in noisy]
        found.append(
            {
                "latency": latency,
                "way": way,
                **{
                    key: together((row[key], row["window_s"]) for row in its)
                    for key in ("trained_per_s", "trees_per_h")
                },
                "tool_calls": sum(row["tool_calls"] for row in its) / trees,
                "generated": sum(row["generated"] for row in its) / trees,
                "fork_share": sum(row["fork_share"] * row["trees"] for row in its) / trees,
                "ratios": ratios,
                "noisy": noisy,
                "ratio": mean_ratio([*ratios.values()]) if ratios else None,
                "quiet": mean_ratio(quiet) if quiet else None,
            }
        )
    return found


def _against(
    cells: Mapping[tuple[str, str], Mapping[str, Any]], spread: str, way: str, base: str, key: str
) -> str | None:
    """A cell's figure beside that of ``base``; None where an interrupted measurement lacks one."""
    one, other = cells.get((spread, way)), cells.get((spread, base))
    return against(one[key], other[key]) if one and other else None


def _plot(
    cells: Mapping[tuple[str, str], Mapping[str, Any]], spreads: Sequence[str], ways: Sequence[str]
) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(ways)
    for number, way in enumerate(ways):
        places = np.arange(len(spreads)) + number * width
        heights = [cells.get((spread, way), {}).get("trees_per_h", 0.0) for spread in spreads]
        axes.bar(places, heights, width, label=way)
    axes.set_xticks(np.arange(len(spreads)) + 0.4 - width / 2, spreads)
    axes.set_ylabel("trees per hour")
    axes.legend(fontsize="x-small")
    return figure
