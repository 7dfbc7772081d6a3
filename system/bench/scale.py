"""``espalier bench scale``: the digital twin from 8 to 4096 GPUs.

For each model size and number of GPUs the best split is searched: how many GPUs go to the learner, how many
to engines, and how many to each engine.  Then, at one size, what the staleness bound, the leaves per tree,
the tools' latency and the engines' tensor parallelism are worth.  Every assumption is in the report; nothing
here was measured on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from system.bench.report import Cell, Report
from system.bench.splits import (
    GRAIN,
    PROFILES,
    Profile,
    Split,
    TrainingLoad,
    best_split,
    engine_sizes,
    roofline,
    simulate_split,
)
from system.config import ConfigError
from system.doctor.facts import usable_cpus
from system.plan.hardware import GIB, GPUS
from system.plan.memory import learner_memory
from system.plan.speed import PublishRoofline

GPU_COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_COLUMNS: dict[str, Callable[[Split], Cell]] = {
    "GPUs": lambda one: one.gpus,
    "learner": lambda one: one.learner_gpus,
    "engines": lambda one: one.engines,
    "tp": lambda one: one.profile.engine.tp,
    "step s": lambda one: one.result.step_s,
    "trained tok/s": lambda one: one.trained_per_s,
    "per GPU": lambda one: one.per_gpu,
    "engines idle": lambda one: f"{one.engine_idle:.0%}",
    "learner idle": lambda one: f"{one.learner_idle:.0%}",
    "decoding per engine": lambda one: one.result.running,
    "tree s, p50": lambda one: one.result.tree_s["p50"],
    "p99": lambda one: one.result.tree_s["p99"],
    "bottleneck": lambda one: one.bottleneck,
}


def _row(point: Split) -> list[Cell]:
    return [column(point) for column in _COLUMNS.values()]


def run(out_dir: Path, quick: bool = False, words: Sequence[str] = ()) -> dict[str, Any]:
    """Simulate, print tables, write ``scale.json``, plots and ``scale.html``.

    ``words``: model sizes, at least one, and numbers of GPUs, by default all.  Raises ConfigError for others.
    """
    asked = {int(word) for word in words if word.isdecimal()}
    names = [word for word in words if not word.isdecimal()]
    sizes = ", ".join(PROFILES)
    if unknown := [name for name in names if name not in PROFILES]:
        raise ConfigError(f"{unknown[0]!r} is neither a model size ({sizes}) nor a number of GPUs")
    if not names:  # all of them take half an hour: nobody should start that unasked
        raise ConfigError(
            f"bench scale: name a model size ({sizes}), and numbers of GPUs unless you want all from "
            f"{GPU_COUNTS[0]} to {GPU_COUNTS[-1]}, for example: espalier bench scale 7B 8 64 --quick"
        )
    counts = asked or ((8, 64, 512, 4096) if quick else GPU_COUNTS)
    work = TrainingLoad(batch_trees=16) if quick else TrainingLoad()
    report = Report(
        out_dir,
        "scale",
        "Scaling, simulated",
        "The digital twin under a roofline of public hardware figures: a forecast with its assumptions, "
        "not a measurement. The batch stays the same while GPUs are added (strong scaling).",
    )
    _assumptions(report, names, work)
    with ProcessPoolExecutor(usable_cpus()) as pool:
        tasks = [(PROFILES[name], gpus, work) for name in names for gpus in sorted(counts, reverse=True)]
        searched = list(_progress(pool.map(best_split, *zip(*tasks, strict=True)), tasks))
        curves = {
            name: sorted((s[0] for s in searched if s and s[0].profile.name == name), key=lambda p: p.gpus)
            for name in names
        }
        for name in names:
            report.section(name)
            report.table(
                f"{name}: best split by number of GPUs", list(_COLUMNS), [_row(p) for p in curves[name]]
            )
            report.text(_bend(curves[name]))
        report.figure("throughput", _plot_curves(curves), "Trained tokens per second at the best split")
        splits = [point for search in searched if search for point in search]
        report.figure(
            "splits", _plot_splits(splits), "The splits that the search looked at, at the best size of engine"
        )
        sweeps = _sweeps(report, pool, curves[names[0]], work)
    data = {
        "workload": asdict(work),
        "grain": GRAIN,
        "curves": {name: [_record(point) for point in points] for name, points in curves.items()},
        "splits": [_record(point) for point in splits],
        "sweeps": {name: [_record(point) for point in points] for name, points in sweeps.items()},
    }
    return report.finish(data)


def _progress(
    searches: Iterator[list[Split]], tasks: Sequence[tuple[Profile, int, TrainingLoad]]
) -> Iterator[list[Split]]:
    """``searches`` as they come, each with a line for whoever waits."""
    for number, (found, (profile, gpus, _)) in enumerate(zip(searches, tasks, strict=True), 1):
        best = f"{found[0].trained_per_s:,.0f} trained tokens/s" if found else "too few"
        print(f"[{number}/{len(tasks)}] {profile.name} on {gpus} GPUs: {best}", file=sys.stderr, flush=True)
        yield found


def _sweeps(
    report: Report, pool: ProcessPoolExecutor, curve: Sequence[Split], work: TrainingLoad
) -> Mapping[str, Sequence[Split]]:
    """One setting at a time, around the best split at a middling size."""
    base = curve[len(curve) // 2]
    profile = base.profile
    changes: dict[str, list[tuple[Any, Profile, TrainingLoad]]] = {
        "η": [(value, profile, replace(work, staleness=value)) for value in (0, 1, 2, 4)],
        "n": [
            (
                n,
                profile,
                replace(work, leaves=n, roots=n // 2, batch_trees=work.batch_trees * work.leaves // n),
            )
            for n in (4, 8, 16, 32)
        ],
        "tool latency": [
            (f"{value:g} s", profile, replace(work, tool_s=value)) for value in (0.1, 1.0, 5.0, 20.0)
        ],
        "engine tp": [(size.engine.tp, size, work) for size in engine_sizes(PROFILES[profile.name])],
    }
    report.section(f"{profile.name} on {base.gpus} GPUs: one setting at a time")
    found: dict[str, Sequence[Split]] = {}
    for name, points in changes.items():
        jobs = [(one, base.gpus, base.replicas, workload) for _, one, workload in points]
        found[name] = list(pool.map(simulate_split, *zip(*jobs, strict=True)))
        rows = [[value, *_row(point)[2:]] for (value, _, _), point in zip(points, found[name], strict=True)]
        report.table(f"{name}, at {base.learner_gpus} learner GPUs", [name, *list(_COLUMNS)[2:]], rows)
    return found


def _bend(curve: Sequence[Split]) -> str:
    """Where throughput per GPU has fallen to half of its best, and why."""
    if not curve:
        return "No number of GPUs simulated holds a learner and an engine."
    best = max(point.per_gpu for point in curve)
    bent = next((point for point in curve if point.per_gpu < best / 2 and point.gpus > curve[0].gpus), None)
    if bent is None:
        return (
            f"Throughput per GPU stays above half of its best ({best:,.0f} tokens/s) up to {curve[-1].gpus} "
            "GPUs."
        )
    there = bent.result
    return (
        f"Throughput per GPU is best at {best:,.0f} tokens/s and less than half of that from {bent.gpus} "
        f"GPUs on. The bottleneck there: {bent.bottleneck} ({there.running:.1f} sequences per engine). "
        f"A step takes {there.step_s:.0f} s, and half of all trees more than {there.tree_s['p50']:.0f} s, "
        "however many GPUs there are: a larger batch or a larger η would use them."
    )


def _assumptions(report: Report, names: Sequence[str], work: TrainingLoad) -> None:
    gpu = GPUS[work.gpu]
    report.section("Assumptions")
    report.text("Workload: one training batch, and what its branches do.")
    report.facts(asdict(work))
    report.text(
        "Hardware: peak figures from the vendor's data sheet; shares of them (MFU, HBM) and overheads are "
        "assumed."
    )
    report.facts(asdict(gpu))
    rows: list[list[Any]] = []
    for name in names:
        profile, shape = PROFILES[name], PROFILES[name].model
        memory = learner_memory(shape, replace(profile.learner, dp=4), reserved=gpu.reserved)
        roof = roofline(profile, work.gpu)
        publish = PublishRoofline(shape, profile.learner, profile.engine, gpu)
        rows.append(
            [
                name,
                shape.name,
                f"tp {profile.learner.tp} pp {profile.learner.pp}",
                memory.total / GIB,
                profile.engine.tp,
                roof.kv_tokens,
                1e3 * roof.step_s(64, 64 * 4096),
                publish.stage_s + publish.pause_s,
            ]
        )
    report.table(
        "Layouts",
        [
            "",
            "model",
            "learner replica",
            "GiB per rank (dp 4)",
            "engine tp",
            "KV tokens",
            "step ms (64 x 4k)",
            "publish s",
        ],
        rows,
        "bf16; sequence parallel, full recomputation, distributed optimizer, micro-batches of 16,384 tokens",
    )
    report.text(
        f"One simulated token stands for {GRAIN} tokens, so lengths are multiples of that. A tree's branches "
        "stay on one engine and share its prefixes; weights reach all engines at once. Left out: network "
        "contention, stragglers among GPUs, failures."
    )


def _record(point: Split) -> dict[str, Any]:
    return {
        "profile": point.profile.name,
        "gpus": point.gpus,
        "learner_gpus": point.learner_gpus,
        "engines": point.engines,
        "engine_tp": point.profile.engine.tp,
        "staleness": point.workload.staleness,
        "leaves": point.workload.leaves,
        "tool_s": point.workload.tool_s,
        "step_s": point.result.step_s,
        "trained_tokens_per_s": point.trained_per_s,
        "engine_idle": point.engine_idle,
        "learner_idle": point.learner_idle,
        "decoding_per_engine": point.result.running,
        "tree_s": point.result.tree_s,
        "bottleneck": point.bottleneck,
        "digest": point.result.digest,
    }


def _plot_curves(curves: Mapping[str, Sequence[Split]]) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, points in curves.items():
        gpus = [point.gpus for point in points]
        left.loglog(gpus, [point.trained_per_s for point in points], marker="o", label=name)
        right.semilogx(gpus, [point.per_gpu for point in points], marker="o", label=name)
    left.set_ylabel("trained tokens/s")
    right.set_ylabel("trained tokens/s per GPU")
    for axes in (left, right):
        axes.set_xlabel("GPUs")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def _plot_splits(points: Sequence[Split]) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    names = list(dict.fromkeys(point.profile.name for point in points))
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False).flat, names, strict=True):
        for gpus in sorted({point.gpus for point in points if point.profile.name == name}):
            found = [p for p in points if p.profile.name == name and p.gpus == gpus]  # the best first
            group = sorted((p for p in found if p.profile == found[0].profile), key=lambda p: p.learner_gpus)
            shares = [point.learner_gpus / gpus for point in group]
            axes.semilogy(shares, [p.trained_per_s for p in group], marker=".", label=f"{gpus}")
        axes.set_title(name)
        axes.set_xlabel("learner's share of the GPUs")
        axes.legend(title="GPUs", fontsize=7)
    return figure
