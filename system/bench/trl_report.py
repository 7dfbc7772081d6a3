"""The report of ``espalier bench trl``: what its runs come to, in tables, a plot and one file of Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from matplotlib.figure import Figure

from system.bench.report import Report
from system.bench.usage import MOST_FOREIGN, MOST_STEAL

Row = Mapping[str, Any]
AS_IT_COMES = ("trl", "trl-1-thread")  # TRL with its tools behind servers: the faster is what others are over


def counted(rows: Sequence[Row]) -> list[Row]:
    """The runs that count: the last of those that were repeated."""
    return [row for row in rows if not row["repeated"]]


def rival(rows: Sequence[Row], latency: float) -> str:
    """TRL's way that others are compared with at this latency: the faster of :data:`AS_IT_COMES`, by its
    median over the rounds; else whichever of TRL's ran; empty: none.
    """
    seconds = _by_way(rows, latency)
    usual = [way for way in AS_IT_COMES if way in seconds]
    others = [way for way in seconds if way.startswith("trl")]
    return min(usual or others, key=lambda way: median(seconds[way].values()), default="")


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """By latency and way, over the rounds: medians, and the ratio to TRL's step in the same round.

    Where some runs of a way were quiet, the others are left out; ratios are of rounds in which both sides
    count.
    """
    found: list[dict[str, Any]] = []
    rows = counted(rows)
    for latency in dict.fromkeys(row["latency"] for row in rows):
        base = rival(rows, latency)
        seconds = _by_way(rows, latency)
        for way, by_round in seconds.items():
            mine = [row for row in rows if row["latency"] == latency and row["way"] == way]
            used = [row for row in mine if row["round"] in by_round]
            shared = [number for number in by_round if number in seconds.get(base, {})]
            found.append(
                {
                    "latency": latency,
                    "way": way,
                    "base": base,
                    "step_s": median(by_round.values()),
                    "rounds_s": list(by_round.values()),
                    "unread": max(row["unread"] for row in used),
                    "ratios": [by_round[number] / seconds[base][number] for number in shared],
                    "launch_s": median(row["launch_s"] for row in used),
                    "peak_mb": median(row["peak_mb"] for row in used),
                    "cpu_s": median(row["cpu_s"] for row in used),
                    "calls": fmean(row["calls"] for row in used),
                    "completions": used[0]["completions"],
                    "accuracies": [row["accuracy"] for row in mine if row["accuracy"] is not None],
                    "rounds": len(mine),
                    "noisy": sum(bool(row["noise"]) for row in mine),
                    "quoted_noise": any(row["noise"] for row in used),
                }
            )
    return found


def _by_way(rows: Sequence[Row], latency: float) -> dict[str, dict[int, float]]:
    """Way → round → seconds per step, of the quiet runs; of all where none of a way was quiet."""
    mine: dict[str, list[Row]] = defaultdict(list)
    for row in counted(rows):
        if row["latency"] == latency:
            mine[row["way"]].append(row)
    return {
        way: {row["round"]: row["step_s"] for row in [one for one in some if not one["noise"]] or some}
        for way, some in mine.items()
    }


def ratio_text(ratios: Sequence[float]) -> str:
    """``0.52 (0.49 to 0.55)``: the median and the range over the rounds."""
    if not ratios:
        return "–"
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{median(ratios):.2f}{spread}"


def write_report(result: dict[str, Any], out_dir: Path) -> dict[str, Any]:
    """``result``: of :meth:`system.bench.trl.Bench.result`; ``summary`` is added to it."""
    rows, plan = result["runs"], result["plan"]
    found = summary(rows)
    report = Report(
        out_dir,
        "trl",
        "Espalier beside TRL on one machine",
        "The same model, prompts, reward and tools; whole runs in turn, round by round. "
        + ("" if result["complete"] else "INTERRUPTED: only the runs until then."),
    )
    before = result["accuracy_before"]
    for latency in dict.fromkeys(one["latency"] for one in found):
        some = [one for one in found if one["latency"] == latency]
        tools = f"a search takes {latency:g} s longer" if latency else "fast tools"
        judged = any(one["accuracies"] for one in some)
        report.section(f"Wall time per training step: {tools}")
        columns = [
            "way",
            "s per step",
            f"× {some[0]['base'] or 'TRL'} (range)",
            "first step s",
            "peak MB (PSS)",
        ]
        report.table(
            f"Medians over rounds: {tools}",
            [*columns, *(["accuracy after"] if judged else []), "rounds", "not quiet"],
            [
                [
                    one["way"] + ("*" if one["quoted_noise"] else ""),
                    f"{one['step_s']:.3f}",
                    ratio_text(one["ratios"]),
                    f"{one['launch_s']:.1f}",
                    f"{one['peak_mb']:,.0f}",
                    *([_accuracy(one["accuracies"])] if judged else []),
                    one["rounds"],
                    one["noisy"],
                ]
                for one in some
            ],
            note="first step: from the command to the end of the first training step; the servers of TRL's "
            "tools run before that. Peak: of all processes at once, these servers included. *: no round was "
            "quiet, all are quoted."
            + " The memory of some processes may not be read, and is left out."
            * any(one["unread"] for one in some)
            + (f" Held-out accuracy before training: {before:.3f}." if judged and before is not None else ""),
        )
    report.figure("trl", _plot(found), "Seconds per training step: medians, and each round")
    report.section(
        "The same work",
        "Checked in every run, which fails otherwise: the questions in the same order (an asynchronous run "
        "issues them so, and trains on what is there), their prompts token by token, and the number of "
        "completions trained on per step. Tool calls per completion are what the models did of themselves; "
        "in trees, branches share the calls before they fork.",
    )
    report.table(
        "Work per training step",
        ["way", "tool latency s", "completions", "tool calls per completion", "CPU s of the whole run"],
        [
            [one["way"], f"{one['latency']:g}", one["completions"], one["calls"], one["cpu_s"]]
            for one in found
        ],
    )
    report.section(
        "Noise",
        f"A run is quiet if less than {MOST_STEAL:.0%} of the processors' time was stolen and others used "
        f"less than {MOST_FOREIGN:g} cores. One that is not is made again, and counts with a mark where that "
        "does not help.",
    )
    report.table(
        "Runs",
        [
            "round",
            "tool latency s",
            "way",
            "s per step",
            "load before",
            "stolen",
            "cores of others",
            "verdict",
        ],
        [
            [
                row["round"],
                f"{row['latency']:g}",
                row["way"],
                f"{row['step_s']:.3f}",
                f"{row['load']:.1f}",
                f"{row['stolen']:.1%}",
                f"{row['foreign']:.2f}",
                ("made again" if row["repeated"] else "not quiet") if row["noise"] else "quiet",
            ]
            for row in rows
        ],
    )
    report.section("Settings")
    report.facts(result["ways"] | {"Espalier's ways": " ".join(result["settings"])})
    report.facts({"plan": ", ".join(f"{name} {value}" for name, value in plan.items())})
    return report.finish({**result, "summary": found})


def _accuracy(found: Sequence[float]) -> str:
    if not found:
        return "–"
    spread = f" ({min(found):.3f} to {max(found):.3f})" if len(found) > 1 else ""
    return f"{fmean(found):.3f}{spread}"


def _plot(found: Sequence[Row]) -> Figure:
    latencies = list(dict.fromkeys(one["latency"] for one in found))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, latency in zip(figure.subplots(1, len(latencies), squeeze=False)[0], latencies, strict=True):
        some = [one for one in found if one["latency"] == latency]
        colours = ["tab:gray" if one["way"].startswith("trl") else "tab:green" for one in some]
        axes.barh([one["way"] for one in some], [one["step_s"] for one in some], color=colours)
        for row, one in enumerate(some):
            axes.plot(one["rounds_s"], [row] * len(one["rounds_s"]), "k|")
        axes.invert_yaxis()
        axes.set_xlabel("seconds per training step (bar: median, marks: rounds)")
        axes.set_title(f"search + {latency:g} s" if latency else "fast tools")
    return figure
