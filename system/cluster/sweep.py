"""The table and the plot of a sweep, from its points' run directories; a failed point is shown as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from system.cluster.status import attempts
from system.observe.plots import BLUE, RED
from system.observe.rundir import write_atomic

MEASURES = {
    "accuracy": "held-out accuracy after training",
    "reward": "held-out reward after training",
    "steps_per_hour": "training steps per hour",
    "tokens_per_s": "tokens generated per second",
}


@dataclass(frozen=True, slots=True)
class SweepResult:
    """One point: its swept values, how it stands, and its measures as far as it has any."""

    name: str
    values: dict[str, str]
    state: str  # finished | failed | stopped | running | waiting
    cause: str
    attempts: int
    measures: dict[str, float]


def is_sweep(root: Path) -> bool:
    return (root / "sweep.json").is_file()


def results(root: Path) -> list[SweepResult]:
    """Every point of the sweep in ``root``."""
    points = json.loads((root / "sweep.json").read_text(encoding="utf-8"))["points"]
    return [_result(root / "points" / point["name"], point) for point in points]


def summarise(root: Path) -> str:
    """Write ``summary.json``, ``summary.md`` and ``summary.png`` into the sweep; returns the table."""
    found = results(root)
    keys = list(found[0].values)
    head = ["point", *keys, "state", *MEASURES, "attempts", "cause"]
    rows = [
        [one.name, *(one.values[key] for key in keys), one.state]
        + [f"{one.measures[name]:.4g}" if name in one.measures else "-" for name in MEASURES]
        + [str(one.attempts), one.cause]
        for one in found
    ]
    ruled = (head, ["---"] * len(head), *rows)
    write_atomic(root / "summary.md", "".join(f"| {' | '.join(line)} |\n" for line in ruled))
    plain = [
        {"point": one.name, "values": one.values, "state": one.state, "cause": one.cause, **one.measures}
        for one in found
    ]
    write_atomic(root / "summary.json", json.dumps(plain, indent=2) + "\n")
    _plot(root / "summary.png", root.name, keys, found)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in (head, *rows)]
    return "\n".join(lines)


def _result(run: Path, point: dict[str, Any]) -> SweepResult:
    chain = attempts(run)
    end = chain[-1]["end"] if chain else None
    state, cause = "running" if chain else "waiting", ""
    if end is not None:
        state = {0: "finished", 3: "stopped"}.get(end["exit"], "failed")
        cause = end["cause"] if end["exit"] else ""
        if end["next"] == "requeue":
            state = "waiting"
    measures: dict[str, float] = {}
    if state == "finished":
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        measures["steps_per_hour"] = summary["versions"] / summary["wall_s"] * 3600
        measures["tokens_per_s"] = summary["tokens"]["generated"] / summary["wall_s"]
        if after := summary["eval"].get("after"):
            measures |= {name: after[name] for name in ("accuracy", "reward")}
    return SweepResult(point["name"], point["values"], state, cause, len(chain), measures)


def _plot(path: Path, title: str, keys: Sequence[str], found: Sequence[SweepResult]) -> None:
    """One panel per measure over the first swept key; further keys are the lines."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    for axes, (measure, what) in zip(figure.subplots(2, 2).flat, MEASURES.items(), strict=True):
        _panel(axes, measure, keys, found)
        axes.set_title(what, fontsize=10)
        axes.set_xlabel(keys[0])
    figure.savefig(path, dpi=110)


def _panel(axes: Axes, measure: str, keys: Sequence[str], found: Sequence[SweepResult]) -> None:
    ticks = list(dict.fromkeys(one.values[keys[0]] for one in found))  # in the order given, evenly spaced
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlim(-0.5, len(ticks) - 0.5)
    lines: dict[str, list[tuple[int, float]]] = {}
    for one in found:
        x = ticks.index(one.values[keys[0]])
        if measure in one.measures:
            label = " ".join(f"{key}={one.values[key]}" for key in keys[1:])
            lines.setdefault(label, []).append((x, one.measures[measure]))
        else:
            bottom = axes.get_xaxis_transform()
            axes.plot([x], [0.04], "x", color=RED, markersize=9, transform=bottom)
            axes.text(x, 0.08, one.state, color=RED, fontsize=8, ha="center", transform=bottom)
    for label, points in lines.items():
        color = BLUE if len(lines) == 1 else None
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=label, color=color)
    if len(lines) > 1:
        axes.legend(fontsize=8)
    axes.grid(visible=True, alpha=0.3)
