"""Benchmark of the rollout schedules on the virtual clock: barrier-free growth against the released rounds.

Trees grow on a digital twin (:mod:`.growth`), so only the schedule differs.

1. Trained trees per hour, by how much tool latencies spread, on the same seeds and engine; and what such a
   tree is made of: forks, tool calls, generated tokens.
2. The makespan of one batch against what no schedule can beat: max(critical path, work / capacity).
3. What the barriers cost when nothing spreads: nothing; what is left at σ = 0 has other causes.
4. Eager growth against linear rollouts, on a few seeds (:mod:`.eager` by itself takes more).
5. The released rules in figures (forks, top-ups, rounds, tool calls by the chance of a call): with them a
   reader can check that the baseline is the released schedule.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from system.bench import eager
from system.bench.baselines import WAYS
from system.bench.growth import STRAGGLERS, Grown, Scenario, agent, grow, latencies
from system.bench.report import Report, against
from system.twin.dist import Lognormal

PER_TREE = {
    "fork_share": ("Share of the leaves that are forks", ".0%"),
    "tool_calls": ("Tool calls per tree", ".1f"),
    "generated": ("Generated tokens per tree", ",.0f"),
}


def run(out_dir: Path, quick: bool = False) -> dict[str, Any]:
    """Measure, write ``schedules.json``, plots and ``schedules.html``; returns what the JSON file holds."""
    batches, trees, seeds = (2, 16, 1) if quick else (4, 32, 4)
    report = Report(
        out_dir,
        "schedules",
        "Rollout schedules on the virtual clock",
        "The released ARPO rounds against barrier-free growth: the same rollouts, seeds, engine and tools.",
    )
    scenario = Scenario(agent(), Lognormal(2.0), trees=trees)
    result = {
        "throughput": _throughput(report, scenario, batches),
        "makespan": _makespan(report, replace(scenario, trees=scenario.trees * 4)),
        "equality": _equality(report, scenario),
        "eager": _eager(report, trees, batches, seeds),
        "rules": _rules(report, 50 if quick else 200),
        "world": {"batches": batches, "trees": trees, "slots": scenario.slots},
    }
    return report.finish(result)


def _throughput(report: Report, scenario: Scenario, batches: int) -> list[dict[str, Any]]:
    rows = []
    for latency in latencies():
        case, runs = replace(scenario, latency=latency), dict[str, Grown]()
        for name, way in WAYS.items():
            # All trees that η permits begin at once, and batches come in bursts after a slow tree: whole
            # periods are counted, after one that is left out.
            period = way.config().flow.staleness + 1
            runs[name] = grow(case, way, batches * period, skip=period)
        rows.append(
            {
                "latency": str(latency),
                "sigma": latency.sigma,
                "stragglers": latency.stragglers,
                "trees_per_h": {name: 3600 * case.trees / one.result.step_s for name, one in runs.items()},
                "engine_busy": {name: one.busy for name, one in runs.items()},
                "tail_s": {name: one.result.tree_s["p99"] for name, one in runs.items()},
                "per_tree": {name: one.per_tree for name, one in runs.items()},
            }
        )
    report.section(
        "Trained trees per hour",
        f"{batches} (η + 1) batches of {scenario.trees} trees after the first η + 1; n = {scenario.leaves}, "
        f"N = {scenario.roots}, at most {scenario.call_limit} calls per branch; segments of "
        f"{scenario.agent.segment_tokens.mean:g} tokens on average, {scenario.slots} sequences decoded at "
        "once; tool calls of 2 s on average. Training takes no time here, so this is what the schedules do "
        "to rollouts alone. tree: forks; linear: n roots, no forks.",
    )
    report.table(
        "Trained trees per hour (× lockstep of the same kind)",
        ["tool latency", *WAYS],
        [[row["latency"], *(_with_ratio(row["trees_per_h"], name) for name in WAYS)] for row in rows],
    )
    report.table(
        "Share of the engine's slots that decode",
        ["tool latency", *WAYS],
        [[row["latency"], *(f"{row['engine_busy'][name]:.0%}" for name in WAYS)] for row in rows],
    )
    for key, (title, form) in PER_TREE.items():
        report.table(
            title,
            ["tool latency", *WAYS],
            [[row["latency"], *(f"{row['per_tree'][name][key]:{form}}" for name in WAYS)] for row in rows],
        )
    report.figure("trees_per_h", _plot(rows), "Trees per hour by the spread of tool latencies")
    return rows


def _with_ratio(values: dict[str, float], name: str) -> str:
    return against(values[name], values["linear lockstep" if name.startswith("linear") else "lockstep"])


def _plot(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for number, share in enumerate((0.0, STRAGGLERS)):
        axes = figure.add_subplot(1, 2, number + 1)
        chosen = [row for row in rows if row["stragglers"] == share]
        for name in WAYS:
            style = "--" if name.startswith("linear") else "-"
            axes.plot(
                [row["sigma"] for row in chosen],
                [row["trees_per_h"][name] for row in chosen],
                f"o{style}",
                label=name,
            )
        axes.set(yscale="log", xlabel="σ of ln(tool seconds)", ylabel="trained trees per hour")
        axes.set_title(f"{share:.0%} stragglers of 30 times" if share else "no stragglers")
    figure.axes[0].legend(fontsize="x-small")
    return figure


def _eager(report: Report, trees: int, periods: int, seeds: int) -> list[dict[str, Any]]:
    found = list(eager.pairs(trees, periods, seeds))
    eager.show(report, found, periods)
    return [asdict(one) for one in found]


def _makespan(report: Report, scenario: Scenario) -> list[dict[str, Any]]:
    """One batch, barrier-free, on an engine with room for every branch, and on a small one."""
    rows: list[dict[str, Any]] = []
    for latency in latencies():
        for slots in (scenario.trees * scenario.leaves, scenario.trees // 4):
            one = grow(replace(scenario, latency=latency, slots=slots), WAYS["tree sync"], 1)
            rows.append(
                {
                    "latency": str(latency),
                    "slots": slots,
                    "makespan_s": one.result.seconds,
                    "critical_path_s": one.critical_path_s,
                    "work_over_capacity_s": one.work_s / slots,
                    "over_bound": one.result.seconds / one.bound_s,
                }
            )
    report.section(
        f"Makespan of one batch of {scenario.trees} trees",
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


def _equality(report: Report, scenario: Scenario) -> dict[str, float]:
    """Take the causes of difference away one by one at σ = 0."""
    still = replace(scenario, latency=Lognormal(2.0), slots=2**20)
    even = replace(still, agent=agent(sigma=0.0))
    cases = {
        "trees, segments of varied length": (still, "lockstep", "tree sync"),
        "trees, equal segments": (even, "lockstep", "tree sync"),
        "linear, segments of varied length": (still, "linear lockstep", "linear sync"),
        "linear, equal segments": (even, "linear lockstep", "linear sync"),
    }
    ratios: dict[str, float] = {}
    for name, (case, *ways) in cases.items():
        rounds, free = (grow(case, WAYS[way], 1).result.seconds for way in ways)
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


def _rules(report: Report, trees: int) -> dict[str, list[float]]:
    """The figures of ``RELEASED`` by the real rollout, one tree at a time.

    One round's entropies are like any other's (ΔH = 0), so a fork is a coin's throw.
    """
    found: dict[str, list[float]] = {}
    for p_call in RELEASED:
        scenario = Scenario(agent(p_call, tokens=20, sigma=0.0), Lognormal(1.0), trees=1)
        ours, plain = (grow(scenario, WAYS[name], trees) for name in ("lockstep", "linear lockstep"))
        branches = [ours.result.per_tree(what) for what in ("forks", "top_ups")]
        calls = ours.result.per_tree("tool_calls") / plain.result.per_tree("tool_calls")
        found[str(p_call)] = [*branches, ours.rounds / trees, plain.rounds / trees, calls]
    report.section(
        "The released rules in figures",
        "One prompt at a time, n = 16, N = 8, at most 3 calls, branching=arpo-release with ΔH = 0, "
        "rollout.schedule=lockstep; in brackets, a simulation of the released rules over 20,000 trees.",
    )
    report.table(
        f"Means over {trees} trees",
        ["chance of a call", "forks", "top-ups", "rounds", "rounds, plain", "tool calls / plain"],
        [
            [p, *(f"{ours:.2f} ({theirs:.2f})" for ours, theirs in zip(found[str(p)], known, strict=True))]
            for p, known in RELEASED.items()
        ],
    )
    return found
