"""Eager growth against linear rollouts on the virtual clock, seed by seed (:mod:`.growth`).

A few calls of minutes decide how long dozens of batches take, and so does the seed: hence many seeds, and
both ways on the same ones with common random numbers (:class:`system.twin.agent.LeafAgent`): they meet the
same slow calls in the same trees, so that the ratio of a seed says more than either figure.  Trees have no
tokens (:mod:`system.twin.lean`), which changes no figure and takes a tenth of the time.  A pair of runs is
written down as it is there, so an interrupted benchmark has what it measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from system.bench.baselines import Way
from system.bench.growth import Grown, Scenario, agent, grow, latencies
from system.bench.report import Report
from system.bench.rounds import mean_ratio, together
from system.errors import ConfigError
from system.observe.jsonl import jsonable
from system.observe.rundir import write_atomic
from system.twin.agent import LeafAgent
from system.twin.dist import Lognormal

SEEDS = 8
CALM_SEEDS = 3  # where no call takes minutes: seeds differ by hundredths there
PERIODS = 4  # of η + 1 batches that are counted
WARM_UP = 1  # such periods before


@dataclass(frozen=True, slots=True)
class Run:
    """One way on one seed."""

    trees_per_h: float
    hours: float  # virtual, of the batches that are counted
    longest_wait_s: float  # between two training steps
    slowest_tree_s: float
    fork_share: float  # of the leaves
    said_yes: float  # share of the forks at results at which the policy asked for one
    tool_calls: float  # per tree

    @classmethod
    def of(cls, one: Grown, trees: int, batches: int) -> Run:
        return cls(
            trees_per_h=3600 * trees / one.result.step_s,
            hours=one.result.step_s * batches / 3600,
            longest_wait_s=one.longest_step_s,
            slowest_tree_s=one.result.tree_s["p100"],
            fork_share=one.per_tree["fork_share"],
            said_yes=one.said_yes,
            tool_calls=one.per_tree["tool_calls"],
        )


@dataclass(frozen=True, slots=True)
class Pair:
    """Both ways on one seed, in one world."""

    staleness: int
    latency: str
    seed: int
    linear: Run
    eager: Run

    @property
    def ratio(self) -> float:
        """Trees per hour of eager growth over those of linear rollouts."""
        return self.eager.trees_per_h / self.linear.trees_per_h


def run(out_dir: Path, words: Sequence[str] = (), quick: bool = False) -> dict[str, Any]:
    """Measure, write ``eager.json`` and ``eager.html``; returns what the JSON file holds.

    ``words``: the number of seeds, :data:`SEEDS` if none is given.  Raises :class:`ConfigError`.
    """
    if len(words) > 1 or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(f"bench eager takes one number of seeds, 1 or more, found: {' '.join(words)}")
    report = Report(
        out_dir,
        "eager",
        "Eager growth against linear rollouts",
        "The same questions, seeds, engine and tools on the virtual clock.",
    )
    seeds = 1 if quick else int(words[0]) if words else SEEDS
    periods, trees = (2, 16) if quick else (PERIODS, 32)
    found: list[Pair] = []
    for pair in pairs(trees, periods, seeds):
        found.append(pair)
        write_atomic(out_dir / "eager.json", json.dumps(jsonable({"eager": [asdict(one) for one in found]})))
        about = f"seed {pair.seed}, η = {pair.staleness}, {pair.latency}"
        print(f"{about}: {pair.linear.trees_per_h:,.0f} and {pair.eager.trees_per_h:,.0f}", flush=True)
    show(report, found, periods)
    return report.finish(
        {"eager": [asdict(one) for one in found], "seeds": seeds, "periods": periods, "trees": trees}
    )


def pairs(trees: int, periods: int, seeds: int) -> Iterator[Pair]:
    """Eager growth and linear rollouts at η = 1 and 4 and every spread of latencies, seed by seed, in batches
    of ``trees``; where latencies are even, on :data:`CALM_SEEDS` at most.
    """
    scenario = Scenario(agent(kind=LeafAgent), Lognormal(2.0), trees=trees)
    for seed in range(seeds):
        for staleness in (1, 4):
            for latency in latencies():
                if seed < CALM_SEEDS or latency.stragglers or latency.sigma > 1:
                    yield pair(replace(scenario, latency=latency), staleness, periods, seed)


def pair(scenario: Scenario, staleness: int, periods: int, seed: int) -> Pair:
    """``periods`` times η + 1 batches of both ways, after :data:`WARM_UP` of them."""
    batches, overrides = periods * (staleness + 1), (f"flow.staleness={staleness}",)
    linear, eager = (
        grow(scenario, Way(recipe, overrides), batches, seed, WARM_UP * (staleness + 1), lean=True)
        for recipe in ("fully-async", "eager")
    )
    runs = (Run.of(one, scenario.trees, batches) for one in (linear, eager))
    return Pair(staleness, str(scenario.latency), seed, *runs)


def cases(found: Iterable[Pair]) -> list[tuple[tuple[int, str], list[Pair]]]:
    """The pairs of each η and latency, over the seeds, in the order in which they were measured."""
    order: dict[tuple[int, str], list[Pair]] = {}
    for one in found:
        order.setdefault((one.staleness, one.latency), []).append(one)
    return list(order.items())


def show(report: Report, found: Sequence[Pair], periods: int) -> None:
    """Put the :func:`cases` into ``report``."""
    seeds = len({one.seed for one in found})
    report.section(
        "Eager growth against linear rollouts",
        "Trained trees per hour under rollout.schedule=eager and of linear rollouts with the same η, of all "
        f"{seeds} seeds together; geometric mean, with its 95 % interval, of the ratios on the same seed; "
        f"{periods} (η + 1) batches after {WARM_UP} (η + 1) that are left out. A seed's slow calls are the "
        "same in both ways.",
    )
    report.table(
        "Trees per hour, forks and tool calls of eager growth against linear rollouts",
        [
            "η",
            "tool latency",
            "linear",
            "eager",
            "ratio, mean",
            "seeds with eager ahead",
            "leaves that are forks",
            "of these, the policy said yes",
            "tool calls per tree (linear)",
        ],
        [
            [
                staleness,
                latency,
                f"{together((one.linear.trees_per_h, one.linear.hours) for one in its):,.0f}",
                f"{together((one.eager.trees_per_h, one.eager.hours) for one in its):,.0f}",
                mean_ratio([one.ratio for one in its]),
                f"{sum(one.ratio >= 1 for one in its)} of {len(its)}",
                f"{fmean(one.eager.fork_share for one in its):.0%}",
                f"{fmean(one.eager.said_yes for one in its):.0%}",
                f"{fmean(one.eager.tool_calls for one in its):.1f} "
                f"({fmean(one.linear.tool_calls for one in its):.1f})",
            ]
            for (staleness, latency), its in cases(found)
        ],
    )
    report.table(
        "What sets the pace: medians over the seeds, eager growth (linear)",
        ["η", "tool latency", "longest wait between training steps, s", "slowest tree, s"],
        [
            [
                staleness,
                latency,
                f"{median(one.eager.longest_wait_s for one in its):,.0f} "
                f"({median(one.linear.longest_wait_s for one in its):,.0f})",
                f"{median(one.eager.slowest_tree_s for one in its):,.0f} "
                f"({median(one.linear.slowest_tree_s for one in its):,.0f})",
            ]
            for (staleness, latency), its in cases(found)
        ],
    )
