"""What the runs of ``espalier study`` say: tables, curves, tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from system.bench.report import Report
from system.study.questions import QUESTIONS
from system.study.statistics import at, interval, sign_flip_test, spent_to_reach
from system.tree.record import Float64

Run = Mapping[str, Any]
Runs = Mapping[tuple[str, str, int], Run]  # by task, arm, seed

SPENT = {"tokens": "tokens generated", "calls": "tool calls"}
WHERE = {
    "probability": "P(fork), 5 to 95 %",
    "decisive": "|P - mean| > 0.1",
    "forked": "leaves from forks",
    "silent": "trees without signal",
    "silent_late": "in the last quarter of the steps",
}
GRID = 50  # points of a curve
GOAL = 0.8  # of the way from the start's accuracy to 1


def write_report(name: str, runs: Runs, out: Path) -> dict[str, Any]:
    """``<name>.json``, its page and its pictures in ``out``; returns the figures."""
    question = QUESTIONS[name]
    tasks, arms, seeds = (list(dict.fromkeys(column)) for column in zip(*runs, strict=True))
    control = question.control if question.control in arms else arms[0]
    about = f"{question.about} Means over seeds ({len(seeds)}) with 95 % intervals."
    report = Report(out, name, question.title, about)
    figures: dict[str, Any] = {"seeds": len(seeds), "tasks": {}}
    ahead: dict[tuple[str, str], list[float]] = {}
    for task in tasks:
        of_task = {
            arm: [runs[task, arm, seed] for seed in seeds if (task, arm, seed) in runs] for arm in arms
        }
        found = figures["tasks"][task] = {}
        report.section(task)
        for spent, words in SPENT.items():
            curves = learning(of_task, spent)
            report.figure(f"{task}-{spent}", _plot(curves, words), f"{task}: held-out accuracy")
            found[spent] = {arm: _figures(of_task[arm], curves, arm, control, spent) for arm in arms}
            for arm in arms:
                ahead.setdefault((arm, spent), []).extend(found[spent][arm]["ahead"])
            columns = ["arm", "mean accuracy", "at the end", f"ahead of {control}", "p"]
            report.table(
                f"{task}, at equal {words}",
                [*columns, f"{words} to {GOAL:.0%} of the way"],
                [
                    [arm, _pm(one["mean"]), _pm(one["end"]), _pm(one["difference"]), one["p"], one["to_goal"]]
                    for arm, one in found[spent].items()
                ],
                "mean accuracy: over what all runs spent; p: paired over seeds, signs flipped",
            )
        found["forks"] = {arm: _forks(of_task[arm]) for arm in arms}
        correlation = "rank correlation of ΔH and the variance of rewards below"
        within = "within one depth and third of the run"
        report.table(
            f"{task}: where trees forked",
            ["arm", *WHERE.values(), correlation, within, "variance by third of ΔH"],
            [
                [
                    arm,
                    *(one[key] for key in WHERE),
                    *(_pm(one[key]) for key in ("correlation", "correlation_within")),
                    one["thirds"],
                ]
                for arm, one in found["forks"].items()
            ],
        )
    together: dict[str, dict[str, Any]] = {
        f"{arm}, {spent}": {"difference": interval(d), "p": sign_flip_test(d), "pairs": len(d)}
        for (arm, spent), d in ahead.items()
        if arm != control
    }
    figures["together"] = together
    report.section("All tasks together")
    report.table(
        f"Mean accuracy ahead of {control}, pairs of runs of one task and seed",
        ["arm, at equal", "ahead", "p", "pairs"],
        [[key, _pm(one["difference"]), one["p"], one["pairs"]] for key, one in together.items()],
    )
    return report.finish({**figures, "runs": {" ".join(map(str, key)): run for key, run in runs.items()}})


def learning(of_task: Mapping[str, Sequence[Run]], spent: str) -> tuple[Float64, dict[str, Float64]]:
    """([G] budgets that every run reached, by arm [seeds, G] its held-out accuracy there)."""
    most = min(run["points"][-1][spent] for some in of_task.values() for run in some)
    budgets = np.linspace(0, most, GRID)
    curves = {
        arm: np.array([at(budgets, *_points(run, spent)) for run in some]) for arm, some in of_task.items()
    }
    return budgets, curves


def _points(run: Run, spent: str) -> tuple[list[float], list[float]]:
    points = run["points"]
    return [float(point[spent]) for point in points], [float(point["accuracy"]) for point in points]


def _figures(
    some: Sequence[Run], curves: tuple[Float64, dict[str, Float64]], arm: str, control: str, spent: str
) -> dict[str, Any]:
    """Of one arm at one task."""
    own = curves[1][arm]
    ahead = (own.mean(axis=1) - curves[1][control].mean(axis=1)).tolist()
    goals = [
        spent_to_reach(accuracy[0] + GOAL * (1 - accuracy[0]), budget, accuracy)
        for budget, accuracy in (_points(run, spent) for run in some)
    ]
    reached = [goal for goal in goals if math.isfinite(goal)]
    return {
        "mean": interval(own.mean(axis=1)),
        "end": interval(own[:, -1]),
        "ahead": ahead,
        "difference": interval(ahead),
        "p": sign_flip_test(ahead) if arm != control else None,
        "to_goal": f"{np.median(reached):,.0f} ({len(reached)} of {len(goals)})" if reached else "never",
    }


def _forks(some: Sequence[Run]) -> dict[str, Any]:
    """Of one arm at one task, means over its runs."""

    def mean(key: str) -> float | None:
        values = [run[key] for run in some if run[key] is not None]
        return float(np.mean(values)) if values else None

    forks = [run["forks"] for run in some if run["forks"].get("correlation") is not None]
    ranges = [run["probability"] for run in some if run["probability"]]
    thirds = np.mean([one["variance_by_third"] for one in forks], axis=0) if forks else []
    return {
        "probability": " to ".join(f"{p:.3f}" for p in np.mean(ranges, axis=0)[[0, -1]]) if ranges else None,
        "decisive": mean("decisive_share"),
        "forked": mean("forked_share"),
        "silent": mean("silent_share"),
        "silent_late": mean("silent_late"),
        "correlation": interval([one["correlation"] for one in forks]),
        "correlation_within": interval(
            [one["correlation_within"] for one in forks if one.get("correlation_within") is not None]
        ),
        "thirds": ", ".join(f"{one:.3f}" for one in thirds) or None,
    }


def _plot(curves: tuple[Float64, dict[str, Float64]], words: str) -> Figure:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.subplots()
    for arm, accuracy in curves[1].items():
        mean = accuracy.mean(axis=0)
        (line,) = ax.plot(curves[0], mean, label=arm)
        if len(accuracy) > 1:
            half = np.array([interval(column)[1] for column in accuracy.T])
            ax.fill_between(
                curves[0], mean - half, mean + half, color=line.get_color(), alpha=0.12, linewidth=0
            )
    ax.set_xlabel(words)
    ax.set_ylabel("held-out accuracy")
    ax.set_ylim(0, 1)
    ax.grid(True, alpha=0.3)
    ax.legend(frameon=False, ncols=2)
    return figure


def _pm(pair: tuple[float, float]) -> str:
    mean, half = pair
    return "–" if math.isnan(mean) else f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ± {half:.3f}"
