"""``espalier bench throughput``: whole runs side by side, on real actors (``actors/throughput.py``)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from system.bench.report import Report


def run(out_dir: Path, quick: bool = False) -> dict[str, Any]:
    """Measure, write ``throughput.json``, plots and ``throughput.html``; returns what the JSON holds."""
    result = importlib.import_module("actors.throughput").measure(out_dir, quick)  # system imports no actors
    write_report(result, out_dir)
    return result


def write_report(result: dict[str, Any], out_dir: Path) -> None:
    """``result``: what ``actors.throughput.measure`` returns."""
    rows = result["runs"]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    spreads = list(dict.fromkeys(row["latency"] for row in rows))
    found = {(row["latency"], row["mode"]): row for row in rows}
    report = Report(
        out_dir,
        "throughput",
        "Training throughput by the spread of tool latencies",
        "Real runs on this machine: the same model, engine, learner, tools and prompts; only the way to run "
        "differs.",
    )
    report.section(
        "Throughput",
        "In brackets: against the released rounds. A run ends with its last training step; what an "
        "asynchronous one has begun for the next is cut off: a short run flatters it by its slowest trees.",
    )
    for key, title in (
        ("trained_per_s", "Trained tokens per second (× lockstep)"),
        ("trees_per_h", "Trees trained on per hour (× lockstep)"),
    ):
        report.table(
            title,
            ["tool latency", *modes],
            [
                [spread, *(_against(found[spread, mode], found[spread, modes[0]], key) for mode in modes)]
                for spread in spreads
            ],
        )
    report.figure("throughput", _plot(found, spreads, modes, "trees_per_h"), "Trees trained on per hour")
    report.section("Where the time goes")
    for actor in ("engine", "learner"):
        causes = sorted({cause for row in rows for cause in row[f"{actor}_idle"]})
        report.table(
            f"{actor}: share of the time spent waiting, by cause",
            ["tool latency", "mode", *causes],
            [
                [row["latency"], row["mode"], *(f"{row[f'{actor}_idle'].get(c, 0.0):.0%}" for c in causes)]
                for row in rows
            ],
        )
    report.section("Staleness, waste and tails")
    report.table(
        "Staleness, goodput, seconds from a tree's first root to its close",
        ["tool latency", "mode", "staleness", "max", "goodput", "tree s", "p95", "max s", "tool calls"],
        [
            [
                row["latency"],
                row["mode"],
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
    report.facts({mode: " ".join(words) for mode, words in result["modes"].items()})
    report.facts({"all": " ".join(result["settings"])})
    report.finish(result)


def _against(row: dict[str, Any], base: dict[str, Any], key: str) -> str:
    return f"{row[key]:,.0f} (× {row[key] / base[key]:.2f})"


def _plot(
    found: dict[tuple[str, str], dict[str, Any]], spreads: list[str], modes: list[str], key: str
) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(modes)
    for number, mode in enumerate(modes):
        places = np.arange(len(spreads)) + number * width
        axes.bar(places, [found[spread, mode][key] for spread in spreads], width, label=mode)
    axes.set_xticks(np.arange(len(spreads)) + 0.4 - width / 2, spreads)
    axes.set_ylabel("trees per hour")
    axes.legend(fontsize="x-small")
    return figure
