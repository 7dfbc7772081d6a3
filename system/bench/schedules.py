"""Benchmark of the rollout schedules on the virtual clock: barrier-free growth against the released rounds.

The rollouts, policies, admission and queue are the ones that train; agent, engine and tools are the digital
twin's (:mod:`system.twin`), so only the schedule differs, and a day of tool calls takes seconds.

1. Completed trees per hour, by how much tool latencies spread, on the same seeds and engine.
2. The makespan of one batch against what no schedule can beat: max(critical path, work / capacity).
3. What the barriers cost when nothing spreads: nothing; what is left at σ = 0 has other causes.
4. The released rules in figures (forks, top-ups, rounds, tool calls by the chance of a call): with them a
   reader can check that the baseline is the released schedule.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from system.bench.critical_path import CriticalPath, MeasuredEngine, MeasuredTools
from system.bench.latency import ToolLatency
from system.bench.report import Report
from system.config import BranchingConfig, RolloutConfig
from system.flow.admission import Admission
from system.flow.replay import Entry, ReplayQueue
from system.rollout.branching import make_policy
from system.rollout.context import RolloutContext
from system.rollout.schedule import Lockstep
from system.rollout.syntax import make_syntax
from system.tools.service import ServiceLimits
from system.tree.record import Origin, Tree
from system.twin import clock
from system.twin.agent import AgentModel, AnswerReward, TwinTokenizer
from system.twin.dist import Constant, Lognormal
from system.twin.engine_model import EngineModel
from system.twin.speeds import LinearEngine
from system.twin.tools import ToolModel, TwinTools

SIGMAS = (0.0, 0.5, 1.0, 1.5)
STRAGGLERS = 0.05
FOREVER_S = 1e9  # deadlines play no part here


@dataclass(frozen=True)
class Mode:
    """A way to run: which trees may grow together, and whether branches wait for each other."""

    name: str
    schedule: str
    branching: str
    staleness: int
    drained: bool = False


MODES = (
    Mode("lockstep", "lockstep", "arpo", 0),
    Mode("sync", "barrier-free", "arpo", 0),
    Mode("async η=1", "barrier-free", "arpo", 1),
    Mode("async η=4", "barrier-free", "arpo", 4),
    Mode("linear lockstep", "lockstep", "none", 0),
    Mode("linear sync", "barrier-free", "none", 0),
    Mode("linear one-step-off", "barrier-free", "none", 1, drained=True),
    Mode("linear async η=4", "barrier-free", "none", 4),
)


@dataclass(frozen=True)
class World:
    """The workload, and what serves it."""

    agent: AgentModel
    latency: ToolLatency
    leaves: int = 16  # n; this and the next two as in ARPO's released 7B recipe
    roots: int = 8  # N
    call_limit: int = 3
    trees: int = 32  # per batch
    slots: int = 256  # sequences that the engine decodes at once, first come first served
    token_s: float = 0.02  # seconds per token of each of them
    window: int = 20  # tokens that a policy looks at


@dataclass(frozen=True)
class Run:
    """What came of growing trees."""

    makespan_s: float
    critical_path_s: float
    work_s: float  # slot-seconds of decoding
    rounds: int  # barriers, in lockstep
    tool_calls: int
    trees: Sequence[Tree]
    closed_s: Sequence[float]  # since the tree's start, per tree

    def origins(self, origin: Origin) -> float:
        """Branches per tree that began as ``origin``."""
        return sum(tree.origins(origin) for tree in self.trees) / len(self.trees)

    def bound_s(self, slots: int) -> float:
        """No schedule ends this work earlier: its longest chain, and its decoding on all slots."""
        return max(self.critical_path_s, self.work_s / slots)


def agent(p_call: float = 0.5, tokens: float = 120, sigma: float = 0.5) -> AgentModel:
    """One whose entropy never changes: a fork is a coin's throw.  ``tokens``: of a segment, on average."""
    return AgentModel(
        prompt_tokens=Constant(1),
        segment_tokens=Lognormal(tokens, sigma),
        p_call=(p_call,),
        root_entropy=1.0,
        rise=0.0,
        entropy_spread=0.0,
    )


def grow(world: World, mode: Mode, batches: int, seed: int = 0) -> Run:
    """Grow ``batches`` batches of trees in virtual time, each trained on in no time as soon as it is
    complete."""
    return clock.run(_grow(world, mode, batches, seed))


async def _grow(world: World, mode: Mode, batches: int, seed: int) -> Run:
    path, agent = CriticalPath(), world.agent
    models = {name: ToolModel(world.latency.dist) for name in agent.tools}
    unlimited = ServiceLimits(deadline_s=FOREVER_S, concurrency=1 << 30, cache_size=0)
    tools = MeasuredTools(TwinTools(models, unlimited, seed), path)
    syntax = make_syntax("tags", tools.specs)
    decoder = EngineModel(
        "engine",
        LinearEngine(world.token_s, 0.0),
        agent,
        first_tokens=world.window,
        max_running=world.slots,
        stops=dict(enumerate(syntax.stops)),
        mixed=True,
    )
    engine = MeasuredEngine(decoder, world.token_s, path)
    context = RolloutContext(
        engine=engine,
        tools=tools,
        syntax=syntax,
        policy=make_policy(BranchingConfig(name=mode.branching, probe_tokens=world.window)),
        reward=AnswerReward(),
        tokenizer=TwinTokenizer(agent),
        config=RolloutConfig(
            schedule=mode.schedule,
            leaves=world.leaves,
            roots=world.roots,
            call_limit=world.call_limit,
            max_response_tokens=1 << 20,
            generate_deadline_s=FOREVER_S,
            branch_deadline_s=FOREVER_S,
            tree_deadline_s=FOREVER_S,
        ),
        vocab_size=100_000,
    )
    began = asyncio.get_running_loop().time()
    trees, closed = await _stream(context, world, mode, batches * world.trees, seed)
    return Run(
        makespan_s=asyncio.get_running_loop().time() - began,
        critical_path_s=path.seconds,
        work_s=engine.work_s,
        rounds=context.schedule.rounds if isinstance(context.schedule, Lockstep) else 0,
        tool_calls=tools.calls,
        trees=trees,
        closed_s=closed,
    )


async def _stream(
    context: RolloutContext, world: World, mode: Mode, total: int, seed: int
) -> tuple[list[Tree], list[float]]:
    """Trees as admission lets them start; a batch is trained on as soon as the queue has one."""
    admission = Admission(world.trees * world.leaves, mode.staleness, concurrency=total)
    queue: ReplayQueue[Tree] = ReplayQueue(world.trees, window=mode.staleness + 2, max_staleness=total)
    trees: list[Tree] = []
    closed: list[float] = []
    time = asyncio.get_running_loop().time
    version, changed = 0, asyncio.Event()

    async def one(number: int) -> None:
        born, began = version, time()
        prompt = world.agent.prompt(f"p{number}", seed)
        tree = await context.grow(prompt, seed=seed + number)
        trees.append(tree)
        closed.append(time() - began)
        admission.finish(world.leaves, tree.n_leaves)
        queue.put(Entry(number, born, tree, world.leaves))
        changed.set()

    async with asyncio.TaskGroup() as growing:
        started = 0
        while len(trees) < total:
            if not (mode.drained and admission.running) and queue.take(version).batch is not None:
                version += 1
            elif started < total and admission.may_start(version):
                admission.start(world.leaves)
                growing.create_task(one(started))
                started += 1
            else:
                changed.clear()
                await changed.wait()
    return trees, closed


def run(out_dir: Path, quick: bool = False) -> dict[str, Any]:
    """Measure, write ``schedules.json``, plots and ``schedules.html``; returns what the JSON file holds."""
    batches, trees = (2, 16) if quick else (4, 32)
    report = Report(
        out_dir,
        "schedules",
        "Rollout schedules on the virtual clock",
        "The released ARPO rounds against barrier-free growth: the same growers, seeds, engine and tools.",
    )
    world = World(agent(), ToolLatency(mean_s=2.0), trees=trees)
    result = {
        "throughput": _throughput(report, world, batches),
        "makespan": _makespan(report, replace(world, trees=world.trees * 4)),
        "equality": _equality(report, world),
        "rules": _rules(report, 50 if quick else 200),
        "world": {"batches": batches, "trees": trees, "slots": world.slots},
    }
    report.finish(result)
    return result


def latencies() -> list[ToolLatency]:
    """Every σ, without stragglers and with."""
    return [ToolLatency(2.0, sigma, share) for share in (0.0, STRAGGLERS) for sigma in SIGMAS]


def _throughput(report: Report, world: World, batches: int) -> list[dict[str, Any]]:
    rows = []
    for latency in latencies():
        runs = {mode.name: grow(replace(world, latency=latency), mode, batches) for mode in MODES}
        rows.append(
            {
                "latency": str(latency),
                "sigma": latency.sigma,
                "stragglers": latency.stragglers,
                "trees_per_h": {name: len(r.trees) / r.makespan_s * 3600 for name, r in runs.items()},
                "engine_busy": {name: r.work_s / (r.makespan_s * world.slots) for name, r in runs.items()},
                "tail_s": {name: _quantile(r.closed_s, 0.99) for name, r in runs.items()},
            }
        )
    report.section(
        "Completed trees per hour",
        f"{batches} batches of {world.trees} trees, n = {world.leaves}, N = {world.roots}, at most "
        f"{world.call_limit} calls per branch; segments of {world.agent.segment_tokens.mean:g} tokens on "
        f"average, {world.slots} sequences decoded at once; tool calls of 2 s on average. Training takes no "
        "time here, so this is what the schedules do to rollouts alone. sync, async: barrier-free trees; "
        "linear: n roots, no forks.",
    )
    names = [mode.name for mode in MODES]
    report.table(
        "Completed trees per hour (× lockstep of the same kind)",
        ["tool latency", *names],
        [[row["latency"], *(_with_ratio(row["trees_per_h"], name) for name in names)] for row in rows],
    )
    report.table(
        "Share of the engine's slots that decode",
        ["tool latency", *names],
        [[row["latency"], *(f"{row['engine_busy'][name]:.0%}" for name in names)] for row in rows],
    )
    report.figure("trees_per_h", _plot(rows, names), "Trees per hour by the spread of tool latencies")
    return rows


def _with_ratio(values: dict[str, float], name: str) -> str:
    base = values["linear lockstep" if name.startswith("linear") else "lockstep"]
    return f"{values[name]:,.0f} (× {values[name] / base:.2f})"


def _plot(rows: list[dict[str, Any]], names: list[str]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for number, share in enumerate((0.0, STRAGGLERS)):
        axes = figure.add_subplot(1, 2, number + 1)
        chosen = [row for row in rows if row["stragglers"] == share]
        for name in names:
            style = "--" if name.startswith("linear") else "-"
            axes.plot(
                [row["sigma"] for row in chosen],
                [row["trees_per_h"][name] for row in chosen],
                f"o{style}",
                label=name,
            )
        axes.set(yscale="log", xlabel="σ of ln(tool seconds)", ylabel="completed trees per hour")
        axes.set_title(f"{share:.0%} stragglers of 30 times" if share else "no stragglers")
    figure.axes[0].legend(fontsize="x-small")
    return figure


def _makespan(report: Report, world: World) -> list[dict[str, Any]]:
    """One batch, barrier-free, on an engine with room for every branch, and on a small one."""
    rows = []
    for latency in latencies():
        for slots in (world.trees * world.leaves, world.trees // 4):
            one = grow(replace(world, latency=latency, slots=slots), MODES[1], 1)
            rows.append(
                {
                    "latency": str(latency),
                    "slots": slots,
                    "makespan_s": one.makespan_s,
                    "critical_path_s": one.critical_path_s,
                    "work_over_capacity_s": one.work_s / slots,
                    "over_bound": one.makespan_s / one.bound_s(slots),
                }
            )
    report.section(
        f"Makespan of one batch of {world.trees} trees",
        "Barrier-free growth of one batch ends when its longest chain of segments and calls does, or when "
        "the engine has decoded everything at full capacity, whichever is later. No schedule can be faster. "
        "Where the two are of one size, a chain also waits for slots now and then; and a full engine has a "
        "tail, when the last branches no longer fill it.",
    )
    report.table(
        "Makespan against max(critical path, work / capacity)",
        [
            "tool latency",
            "engine slots",
            "makespan s",
            "critical path s",
            "work / capacity s",
            "over the bound",
        ],
        [[*list(row.values())[:5], f"{row['over_bound'] - 1:+.1%}"] for row in rows],
    )
    return rows


def _equality(report: Report, world: World) -> dict[str, float]:
    """Take the causes of difference away one by one at σ = 0."""
    still = replace(world, latency=ToolLatency(2.0), slots=2**20)
    even = replace(still, agent=agent(sigma=0.0))
    cases = {
        "trees, segments of varied length": (still, "arpo"),
        "trees, equal segments": (even, "arpo"),
        "linear, segments of varied length": (still, "none"),
        "linear, equal segments": (even, "none"),
    }
    ratios = {}
    for name, (case, branching) in cases.items():
        free, rounds = (
            grow(case, Mode("", schedule, branching, 0), 1).makespan_s
            for schedule in ("barrier-free", "lockstep")
        )
        ratios[name] = rounds / free
    report.section(
        "Equality at σ = 0",
        "A barrier costs the difference between the slowest and the others. With constant tool latency, "
        "equal segments and an engine that has room for all, all arrive together, and linear rollouts take "
        "exactly as long in rounds as without. What is left for trees is the released top-up rule, one root "
        "per round, and the fork that waits for the end of a segment; with varied segments, the longest of "
        "each round.",
    )
    report.table(
        "Time in rounds / time without barriers, one batch, constant tool latency",
        ["case", "ratio"],
        [[name, f"{ratio:.3f}"] for name, ratio in ratios.items()],
    )
    return ratios


# The released rules by the chance of a call: forks, top-ups, rounds, rounds of plain rollouts, and tool calls
# per tool call of plain rollouts.  A simulation of the released code's rules over 20,000 trees.
RELEASED = {
    0.3: (2.96, 5.04, 10.3, 3.1, 0.96),
    0.5: (5.39, 2.61, 9.0, 3.9, 0.86),
    0.7: (7.25, 0.75, 6.0, 4.0, 0.77),
    0.9: (7.94, 0.06, 4.2, 4.0, 0.74),
}


def rules(p_call: float, trees: int, seed: int = 0) -> tuple[float, float, float, float, float]:
    """The figures of ``RELEASED`` for one ``p_call``, by the real rollout on ``trees`` trees, one at a time.

    One round's entropies are like any other's (ΔH = 0), so a fork is a coin's throw.
    """
    world = World(agent(p_call, tokens=20, sigma=0.0), ToolLatency(), trees=1)
    release, plain = Mode("", "lockstep", "arpo-release", 0), Mode("", "lockstep", "none", 0)
    ours, theirs = (grow(world, mode, trees, seed) for mode in (release, plain))
    return (
        ours.origins(Origin.FORK),
        ours.origins(Origin.TOP_UP),
        ours.rounds / trees,
        theirs.rounds / trees,
        ours.tool_calls / theirs.tool_calls,
    )


def _rules(report: Report, trees: int) -> dict[str, Any]:
    report.section(
        "The released rules in figures",
        "One prompt at a time, n = 16, N = 8, at most 3 calls, branching=arpo-release with ΔH = 0, "
        "rollout.schedule=lockstep; in brackets, a simulation of the released rules over 20,000 trees.",
    )
    found = {p_call: rules(p_call, trees) for p_call in RELEASED}
    report.table(
        f"Means over {trees} trees",
        ["chance of a call", "forks", "top-ups", "rounds", "rounds, plain", "tool calls / plain"],
        [
            [p, *(f"{ours:.2f} ({known:.2f})" for ours, known in zip(found[p], RELEASED[p], strict=True))]
            for p in RELEASED
        ],
    )
    return {str(p_call): list(values) for p_call, values in found.items()}


def _quantile(values: Sequence[float], share: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1]
