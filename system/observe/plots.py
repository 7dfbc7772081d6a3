"""PNG curves of a run, from ``metrics.jsonl``: one picture per question, and all of them on one page.

Figures are made without pyplot, so they need no display and leave the importer's backend alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from system.observe.rundir import RunDir
from system.observe.sinks import history, series

Records = list[dict[str, Any]]

# Okabe and Ito's palette, which readers with any kind of colour vision can tell apart.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK = "#CC79A7", "#56B4E9", "#222222"
_CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
_GRID = "#E6E6E6"
_BELOW = 32  # points from an x axis to its legend: room for its numbers and its label


@dataclass(frozen=True, slots=True)
class Curve:
    """One picture: its file name, its title, and what draws it, if there is something to draw.

    ``draw`` is a function, or the lines: each (key, label, colour) or with a style.  ``top``: of the y axis,
    which begins at 0; 0: above the highest point.
    """

    name: str
    title: str
    draw: Callable[[Axes, Records], None] | tuple[tuple[str, ...], ...]
    unit: str = ""
    top: float | None = None


def draw(run_dir: RunDir) -> list[Path]:
    """Draw every curve that has data into ``curves/``; returns the files, the overview first."""
    records = history(run_dir.metrics_path)
    files, drawn = [], []
    for curve in (*SUPERVISED, *CURVES):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        if _panel(figure.subplots(), curve, records):
            path = run_dir.curves / f"{curve.name}.png"
            figure.savefig(path, dpi=110)
            files.append(path)
            drawn.append(curve)
    if not drawn:
        return []
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows + 0.5), layout="constrained")
    figure.suptitle(run_dir.name, fontsize=14, fontweight="bold", color=BLACK)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for ax, curve in zip(axes, drawn, strict=False):
        _panel(ax, curve, records)
    for ax in list(figure.axes)[len(drawn) : rows * columns]:
        ax.set_visible(False)
    overview = run_dir.curves / "overview.png"
    figure.savefig(overview, dpi=110)
    return [overview, *files]


def _panel(ax: Axes, curve: Curve, records: Records) -> bool:
    """Whether there was something to draw."""
    ax.set_title(curve.title, fontsize=11, loc="left", color=BLACK)
    ax.set_xlabel("training step", fontsize=9)
    ax.grid(True, color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if isinstance(curve.draw, tuple):
        for line in curve.draw:
            _line(ax, records, *line)
    else:
        curve.draw(ax, records)
    _legend(ax)
    if curve.unit:
        ax.set_ylabel(curve.unit, fontsize=9)
    if curve.top is not None:
        low, high = ax.dataLim.intervaly
        ax.set_ylim(0, curve.top or (1.15 * high if high > low or high > 0 else 1))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax.has_data()


def _legend(ax: Axes) -> None:
    """Below the axis and its label, where it hides no data."""
    handles, labels = ax.get_legend_handles_labels()
    figure = ax.get_figure(root=True)
    if not handles or figure is None:
        return
    below = ax.transAxes + ScaledTranslation(0, -_BELOW / 72, figure.dpi_scale_trans)
    ax.legend(
        handles,
        labels,
        fontsize=8,
        frameon=False,
        ncols=min(2, len(labels)),
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=below,
        borderaxespad=0,
    )


def smooth(values: Sequence[float], span: int, weights: Sequence[float] | None = None) -> list[float]:
    """Trailing mean over up to ``span`` values; with ``weights`` (> 0), the weighted mean."""
    weight = np.ones(len(values)) if weights is None else np.asarray(weights)
    total, mass = (np.concatenate([[0.0], np.cumsum(x)]) for x in (weight * np.asarray(values), weight))
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - span, 0)
    return ((total[stop] - total[start]) / (mass[stop] - mass[start])).tolist()


def _line(ax: Axes, records: Records, key: str, label: str, colour: str, style: str = "-") -> None:
    """A smoothed line over the faint raw one.

    Rates and shares of a step's time are smoothed by that time, so that a line through them is the rate over
    several steps; their plain mean would favour the short steps.
    """
    points = list(series(records, key))
    if not points:
        return
    steps, values = zip(*points, strict=True)
    span = max(1, len(values) // 20)
    seconds = dict(series(records, "time/window_s")) if key.startswith("time/") else {}
    weights = [max(seconds.get(step, 1.0), 1e-3) for step in steps]
    if span > 1:
        ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.9)
    ax.plot(steps, smooth(values, span, weights), style, color=colour, linewidth=1.8, label=label)
    if len(values) == 1:
        ax.plot(steps, values, "o", color=colour, markersize=4)


def _accuracy(ax: Axes, records: Records) -> None:
    _line(ax, records, "rollout/accuracy", "training, sampled", BLUE)
    points = list(series(records, "eval/accuracy"))
    if points:
        steps, values = zip(*points, strict=True)
        ax.plot(steps, values, "o-", color=RED, markersize=6, linewidth=1.2, label="held-out questions")
        for step, value in (points[0], points[-1]):
            ax.annotate(
                f"{value:.3f}",  # as everywhere else: 0.995 is not 0.99
                (step, value),
                (0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=RED,
                zorder=5,  # above the curves, which would strike it through
                bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5},
            )
    ax.set_ylim(-0.02, 1.1)
    ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])


def _entropy(ax: Axes, records: Records) -> None:
    _line(ax, records, "rollout/entropy", "token entropy (nats)", BLUE)
    low, high = list(series(records, "tree/delta_h_p10")), list(series(records, "tree/delta_h_p90"))
    if low and len(low) == len(high):
        steps = [step for step, _ in low]
        span = max(1, len(steps) // 20)
        bottom, top = smooth([v for _, v in low], span), smooth([v for _, v in high], span)
        ax.fill_between(steps, bottom, top, color=ORANGE, alpha=0.2, linewidth=0, label="ΔH, 10–90 %")
    _line(ax, records, "tree/delta_h", "ΔH after a tool result", ORANGE)
    if ax.has_data():
        ax.axhline(0, color=BLACK, linewidth=0.6)


def _staleness(ax: Axes, records: Records) -> None:
    """Stacked shares of trained trees by how many versions they lagged."""
    keys = {key for one in records for key in one if re.match(r"flow/staleness_share/\d+$", key)}
    lags = sorted(int(key.rsplit("/", 1)[1]) for key in keys)
    trained = [one for one in records if "flow/staleness" in one]
    if not trained:
        return
    steps = [one["step"] for one in trained]
    span = max(1, len(steps) // 20)
    shares = [smooth([one.get(f"flow/staleness_share/{lag}", 0.0) for one in trained], span) for lag in lags]
    colours = [colormaps["YlGnBu"](0.2 + 0.7 * i / max(1, len(lags) - 1)) for i in range(len(lags))]
    labels = [f"{lag} version{'s' * (lag != 1)} behind" for lag in lags]
    ax.stackplot(steps, shares, labels=labels, colors=colours, alpha=0.8)
    ax.set_ylim(0, 1)


def _idle(ax: Axes, records: Records) -> None:
    keys = sorted({key for one in records for key in one if key.startswith("time/idle_share/")})
    for i, key in enumerate(keys[: 2 * len(_CYCLE)]):
        _, _, actor, cause = key.split("/", 3)
        # A record without the key is a window without that wait.
        filled = [{key: 0.0, **one} for one in records if "time/window_s" in one]
        _line(ax, filled, key, f"{actor}: {cause}", _CYCLE[i % 6], "-" if i < 6 else "--")


SUPERVISED = (
    Curve(
        "supervised",
        "Loss, nats per token",
        (("sft/loss", "trained on", BLUE), ("sft/held_out_loss", "held out", ORANGE, "o-")),
    ),
    Curve("supervised_rate", "Learning rate", (("sft/lr", "of the step", GREEN),), top=0),
)
CURVES = (
    Curve("accuracy", "Accuracy", _accuracy),
    Curve(
        "reward",
        "Reward",
        (("rollout/reward", "closed trees", BLUE), ("train/reward", "trained on", ORANGE, "--")),
    ),
    Curve("entropy", "Entropy, and its rise after tool results", _entropy),
    Curve(
        "branching",
        "Branching, per tree",
        (
            ("tree/forks", "forks", BLUE),
            ("tree/top_ups", "top-ups", ORANGE),
            ("tree/decisions", "decisions", GREEN),
        ),
        top=0,
    ),
    Curve(
        "forking",
        "Where trees fork",
        (
            ("tree/fork_rate_unsure", "highest third of ΔH", ORANGE),
            ("tree/fork_rate", "all results", GREEN),
            ("tree/fork_rate_sure", "lowest third of ΔH", BLUE),
            ("tree/decisive_share", "decisive: |P - mean P| > 0.1", RED, "--"),
        ),
        "share",
        top=1,
    ),
    Curve("staleness", "Staleness of what was trained on", _staleness, "share of trained trees"),
    Curve(
        "throughput",
        "Throughput",
        (("time/generated_per_s", "generated", BLUE), ("time/trained_per_s", "trained on", ORANGE, "--")),
        "model tokens/s",
        top=0,
    ),
    Curve("idle", "Idle time by cause", _idle, "share of time", top=0),
    Curve(
        "tokens",
        "Use made of tokens and trees",
        (
            ("tree/unique_flat_ratio", "unique / flattened tokens", BLUE),
            ("flow/goodput", "trained / generated tokens", GREEN),
            ("train/zero_variance_share", "trees without reward variance", RED),
        ),
        top=1.15,
    ),
    Curve(
        "length",
        "Response length",
        (
            ("rollout/response_tokens", "generated", BLUE),
            ("train/response_tokens", "trained on", ORANGE, "--"),
        ),
        "model tokens per branch",
        top=0,
    ),
)
