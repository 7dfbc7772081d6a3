"""``espalier bench scale``: the digital twin from 8 to 4096 GPUs.

For each model size and number of GPUs the best split between learner and engines is searched, with the real
control flow around a roofline of the hardware (``system.plan``).  Then, at one size, what the staleness
bound, the leaves per tree and the tools' latency are worth.  Every assumption is in the report; nothing here
was measured on a GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from system.bench.report import Report
from system.bench.twin.agent import AgentModel
from system.bench.twin.books import TwinResult
from system.bench.twin.dist import Constant, Lognormal, Stragglers
from system.bench.twin.tools import ToolModel
from system.bench.twin.world import Models, simulate
from system.config import Config, ConfigError, load
from system.plan.hardware import GIB, GPUS, Gpu
from system.plan.memory import EngineLayout, LearnerLayout, learner_memory
from system.plan.shapes import KNOWN
from system.plan.speed import EngineRoofline, LearnerRoofline, publish_s

WORDS = "PROFILE …"  # takes names of profiles
GPU_COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
GRAIN = 32  # tokens that one simulated token stands for
SKIP, CYCLES = 1, 3  # training steps left out at the start; periods of η + 1 steps simulated after that
IDLE = 0.10  # below this share of idle time a part counts as busy
FULL = 1.4  # an engine is full when twice the sequences would bring less than so much more


@dataclass(frozen=True)
class Profile:
    """A model size, and how its ranks and engines are laid out."""

    name: str
    shape: str
    learner: LearnerLayout  # of one replica (dp = 1)
    engine: EngineLayout


def _replica(tp: int, pp: int = 1) -> LearnerLayout:
    return LearnerLayout(
        tp=tp,
        pp=pp,
        micro_tokens=16_384,
        sequence_parallel=True,
        recompute="full",
        distributed_optimizer=True,
    )


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("7B", "qwen2.5-7b", _replica(4), EngineLayout(tp=1)),
        Profile("14B", "qwen2.5-14b", _replica(8), EngineLayout(tp=1)),
        Profile("32B", "qwen2.5-32b", _replica(8, 2), EngineLayout(tp=2)),
    )
}


@dataclass(frozen=True)
class Workload:
    """What is trained on, after ARPO's recipes: 16 leaves, 8 roots, 3 calls at most; 64 prompts a step."""

    batch_trees: int = 64
    leaves: int = 16
    roots: int = 8
    staleness: int = 1
    prompt_tokens: float = 1024
    segment_tokens: float = 1024  # model tokens up to a call or the end, mean; lognormal, σ = 0.7
    result_tokens: float = 512
    p_call: float = 0.7
    call_limit: int = 3
    tool_s: float = 1.0  # mean; lognormal, σ = 1, and 5 % of calls take 30 times as long
    pause_s: float = 0.3  # engines stand still for a weight update
    gpu: str = "h100"


@dataclass(frozen=True)
class Point:
    """One simulated run."""

    profile: str
    gpus: int
    learner_gpus: int
    engines: int
    workload: Workload
    result: TwinResult

    @property
    def trained_per_s(self) -> float:
        """Trained model tokens per second."""
        return self.result.trained_per_s * GRAIN

    @property
    def per_gpu(self) -> float:
        """Trained model tokens per second and GPU."""
        return self.trained_per_s / self.gpus

    @property
    def engine_idle(self) -> float:
        shares = [sum(c.values()) for name, c in self.result.idle.items() if name.startswith("engine-")]
        return sum(shares) / len(shares)

    @property
    def learner_idle(self) -> float:
        return self.result.idle["learner"].get("no batch", 0.0)

    @property
    def bottleneck(self) -> str:
        """Which part has no time to spare; if each has, what they all wait for.

        "Taking turns": at η = 0 generation and training wait for each other.  "Few branches": engines decode
        fewer sequences than would fill them, so a step lasts as long as its longest trees.
        """
        if self.learner_idle < IDLE:
            return "training"
        if self.engine_idle < IDLE and self.crowding < FULL:
            return "generation"
        if self.workload.staleness == 0:
            return "taking turns"
        return "few branches"

    @property
    def crowding(self) -> float:
        """What twice as many sequences per engine would bring: 1 nothing, 2 twice the tokens per second."""
        roof = _roofline(PROFILES[self.profile], GPUS[self.workload.gpu])
        work, n = self.workload, self.result.running
        context = work.prompt_tokens + (work.segment_tokens + work.result_tokens) * (work.call_limit + 1) / 2
        if 2 * n * context > roof.kv_tokens:
            return 1.0
        return 2 * roof.step_s(n, n * context) / roof.step_s(2 * n, 2 * n * context)

    def row(self) -> list[Any]:
        return [
            self.gpus,
            self.learner_gpus,
            self.engines,
            self.result.step_s,
            self.trained_per_s,
            self.per_gpu,
            f"{self.engine_idle:.0%}",
            f"{self.learner_idle:.0%}",
            self.result.running,
            self.result.tree_s["p50"],
            self.result.tree_s["p99"],
            self.bottleneck,
        ]


_COLUMNS = (
    "GPUs",
    "learner",
    "engines",
    "step s",
    "trained tok/s",
    "per GPU",
    "engines idle",
    "learner idle",
    "decoding per engine",
    "tree s, p50",
    "p99",
    "bottleneck",
)


def _roofline(profile: Profile, gpu: Gpu) -> EngineRoofline:
    return EngineRoofline(KNOWN[profile.shape], profile.engine, gpu)


@dataclass(frozen=True, slots=True)
class _Grains:
    """An engine or learner that counts in grains of tokens."""

    engine: EngineRoofline
    learner: LearnerRoofline

    @property
    def kv_tokens(self) -> int:
        return self.engine.kv_tokens // GRAIN

    def step_s(self, running: float, context: float) -> float:
        return GRAIN * self.engine.step_s(running, context * GRAIN)

    def prefill_s(self, tokens: float) -> float:
        return self.engine.prefill_s(tokens * GRAIN)

    def train_s(self, tokens: float) -> float:
        return self.learner.train_s(tokens * GRAIN)


def simulate_split(profile: Profile, gpus: int, replicas: int, work: Workload) -> Point:
    """``gpus`` GPUs of which ``replicas`` learner replicas take theirs and engines the rest."""
    gpu, shape = GPUS[work.gpu], KNOWN[profile.shape]
    learner = replace(profile.learner, dp=replicas)
    engines = (gpus - learner.gpus) // profile.engine.tp
    if engines < 1:
        raise ConfigError(
            f"{profile.name}: {gpus} GPUs leave none for engines beside the learner's {learner.gpus}"
        )
    speed = _Grains(_roofline(profile, gpu), LearnerRoofline(shape, learner, gpu))
    agent = AgentModel(
        prompt_tokens=Constant(work.prompt_tokens / GRAIN),
        segment_tokens=Lognormal(work.segment_tokens / GRAIN, 0.7),
        p_call=(work.p_call,),
    )
    latency = Stragglers(Lognormal(work.tool_s, 1.0))
    models = Models(
        engine=speed,
        learner=speed,
        agent=agent,
        tools={"search": ToolModel(latency, Constant(work.result_tokens / GRAIN))},
        publish_s=publish_s(shape, gpu),
        update_s=work.pause_s,
        vocab=shape.vocab,
    )
    skip = SKIP + work.staleness  # all trees that η permits begin at once; a period later they are spread
    result = simulate(_config(work, engines), models, steps=skip + CYCLES * (work.staleness + 1), skip=skip)
    return Point(profile.name, gpus, learner.gpus, engines, work, result)


def _config(work: Workload, engines: int) -> Config:
    longest = round((work.call_limit + 1) * 8 * (work.segment_tokens + work.result_tokens) / GRAIN)
    return load(
        None,
        [
            f"rollout.leaves={work.leaves}",
            f"rollout.roots={work.roots}",
            f"rollout.call_limit={work.call_limit}",
            f"rollout.concurrency={(work.staleness + 1) * work.batch_trees}",
            f"rollout.max_response_tokens={longest}",
            f"rollout.max_tool_result_tokens={round(work.result_tokens / GRAIN) + 4}",
            "rollout.generate_deadline_s=1e9",
            "rollout.branch_deadline_s=1e9",
            "rollout.tree_deadline_s=1e9",
            "branching.probe_tokens=1",
            "engine.chunk_tokens=1",
            "engine.max_running=512",
            f"engine.max_context={2 * longest}",
            f"engine.replicas={engines}",
            "tools.concurrency=1000000",
            "tools.deadline_s=1e9",
            "tools.cache_size=0",
            f"flow.batch_leaves={work.leaves * work.batch_trees}",
            f"flow.staleness={work.staleness}",
        ],
    )


def best_split(profile: Profile, gpus: int, work: Workload) -> list[Point]:
    """All splits that the search looked at, the best first.

    Throughput rises with learner replicas while training is the bottleneck and falls when engines get too
    few, so a ternary search over the replicas (by powers of two first) finds the top.
    """
    most = (gpus - profile.engine.tp) // profile.learner.gpus
    if most < 1:
        return []
    seen: dict[int, Point] = {}

    def rate(replicas: int) -> float:
        if replicas not in seen:
            seen[replicas] = simulate_split(profile, gpus, replicas, work)
        return seen[replicas].result.trained_per_s

    count = max(1, most // 2)
    rate(count)
    step = max(1, count // 2)
    while True:
        better = [c for c in (count - step, count + step) if 1 <= c <= most and rate(c) > rate(count)]
        if better:
            count = max(better, key=rate)
        elif step == 1 or step <= count // 8:  # a finer split changes less than the seeds do
            break
        else:
            step = max(1, step // 2)
    return sorted(seen.values(), key=lambda point: -point.result.trained_per_s)


def run(out_dir: Path, quick: bool = False, words: Sequence[str] = ()) -> dict[str, Any]:
    """Simulate, print tables, write ``scale.json``, plots and ``scale.html``; ``words`` name profiles."""
    names = list(words) or list(PROFILES)
    if unknown := [name for name in names if name not in PROFILES]:
        raise ConfigError(f"unknown profile {unknown[0]!r}; known: {', '.join(PROFILES)}")
    counts = (8, 64, 512, 4096) if quick else GPU_COUNTS
    work = Workload(batch_trees=16) if quick else Workload()
    report = Report(
        out_dir,
        "scale",
        "Scaling, simulated",
        "The digital twin under a roofline of public hardware figures: a forecast with its assumptions, "
        "not a measurement. The batch stays the same while GPUs are added (strong scaling).",
    )
    _assumptions(report, names, work)
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers) as pool:
        tasks = [(PROFILES[name], gpus, work) for name in names for gpus in sorted(counts, reverse=True)]
        searched = list(_progress(pool.map(best_split, *zip(*tasks, strict=True)), tasks))
        curves = {
            name: sorted((s[0] for s in searched if s and s[0].profile == name), key=lambda p: p.gpus)
            for name in names
        }
        for name in names:
            report.section(name)
            report.table(f"{name}: best split by number of GPUs", _COLUMNS, [p.row() for p in curves[name]])
            report.text(_bend(curves[name]))
        report.figure("throughput", _plot_curves(curves), "Trained tokens per second at the best split")
        splits = [point for search in searched if search for point in search]
        report.figure("splits", _plot_splits(splits), "Every split that the search looked at")
        sweeps = _sweeps(report, pool, PROFILES[names[0]], curves[names[0]], work)
    data = {
        "workload": asdict(work),
        "grain": GRAIN,
        "curves": {name: [_record(point) for point in points] for name, points in curves.items()},
        "splits": [_record(point) for point in splits],
        "sweeps": {name: [_record(point) for point in points] for name, points in sweeps.items()},
    }
    report.finish(data)
    return data


def _progress(
    searches: Iterator[list[Point]], tasks: Sequence[tuple[Profile, int, Workload]]
) -> Iterator[list[Point]]:
    """``searches`` as they come, each with a line for whoever waits."""
    for number, (found, (profile, gpus, _)) in enumerate(zip(searches, tasks, strict=True), 1):
        best = f"{found[0].trained_per_s:,.0f} trained tokens/s" if found else "too few"
        print(f"[{number}/{len(tasks)}] {profile.name} on {gpus} GPUs: {best}", file=sys.stderr, flush=True)
        yield found


def _sweeps(
    report: Report, pool: ProcessPoolExecutor, profile: Profile, curve: Sequence[Point], work: Workload
) -> Mapping[str, Sequence[Point]]:
    """One setting at a time, around the best split at a middling size."""
    base = curve[len(curve) // 2]
    replicas = base.learner_gpus // profile.learner.gpus
    changes: dict[str, list[Workload]] = {
        "η": [replace(work, staleness=value) for value in (0, 1, 2, 4)],
        "n": [
            replace(work, leaves=n, roots=n // 2, batch_trees=work.batch_trees * work.leaves // n)
            for n in (4, 8, 16, 32)
        ],
        "tool latency": [replace(work, tool_s=value) for value in (0.1, 1.0, 5.0, 20.0)],
    }
    shown: dict[str, Callable[[Workload], Any]] = {
        "η": lambda w: w.staleness,
        "n": lambda w: w.leaves,
        "tool latency": lambda w: f"{w.tool_s:g} s",
    }
    report.section(f"{profile.name} on {base.gpus} GPUs: one setting at a time")
    found: dict[str, Sequence[Point]] = {}
    for name, works in changes.items():
        points = list(
            pool.map(simulate_split, *zip(*[(profile, base.gpus, replicas, w) for w in works], strict=True))
        )
        found[name] = points
        rows = [[shown[name](point.workload), *point.row()[3:]] for point in points]
        report.table(f"{name}, at {base.learner_gpus} learner GPUs", [name, *_COLUMNS[3:]], rows)
    return found


def _bend(curve: Sequence[Point]) -> str:
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


def _assumptions(report: Report, names: Sequence[str], work: Workload) -> None:
    gpu = GPUS[work.gpu]
    report.section("Assumptions")
    report.text("Workload: one training batch, and what its branches do.")
    report.facts(asdict(work))
    report.text(
        "Hardware: peak figures from the vendor's data sheet; shares of them (MFU, HBM) and overheads are "
        "assumed."
    )
    report.facts(gpu.assumptions())
    rows: list[list[Any]] = []
    for name in names:
        profile, shape = PROFILES[name], KNOWN[PROFILES[name].shape]
        memory = learner_memory(shape, replace(profile.learner, dp=4), gpu.reserved)
        roof = _roofline(profile, gpu)
        rows.append(
            [
                name,
                shape.name,
                f"tp {profile.learner.tp} pp {profile.learner.pp}",
                memory.total / GIB,
                profile.engine.tp,
                roof.kv_tokens,
                1e3 * roof.step_s(64, 64 * 4096),
                publish_s(shape, gpu),
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


def _record(point: Point) -> dict[str, Any]:
    return {
        "profile": point.profile,
        "gpus": point.gpus,
        "learner_gpus": point.learner_gpus,
        "engines": point.engines,
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


def _plot_curves(curves: Mapping[str, Sequence[Point]]) -> Figure:
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


def _plot_splits(points: Sequence[Point]) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    names = list(dict.fromkeys(point.profile for point in points))
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False).flat, names, strict=True):
        for gpus in sorted({point.gpus for point in points if point.profile == name}):
            group = sorted(
                (p for p in points if p.profile == name and p.gpus == gpus), key=lambda p: p.learner_gpus
            )
            shares = [point.learner_gpus / gpus for point in group]
            axes.semilogy(shares, [p.trained_per_s for p in group], marker=".", label=f"{gpus}")
        axes.set_title(name)
        axes.set_xlabel("learner's share of the GPUs")
        axes.legend(title="GPUs", fontsize=7)
    return figure
