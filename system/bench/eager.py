"""Eager growth against linear rollouts on the virtual clock, seed by seed (:mod:`.growth`).

A few calls of minutes decide how long twenty batches take, and so does the seed: hence many seeds, ratios on
the same seed, and their geometric mean with its standard error.  A case is written down as it is there, so an
interrupted benchmark has what it measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from system.bench.baselines import Way
from system.bench.growth import Scenario, agent, grow, latencies
from system.bench.report import Report
from system.errors import ConfigError
from system.observe.jsonl import jsonable
from system.observe.rundir import write_atomic
from system.twin.dist import Lognormal

SEEDS = 8


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
    batches, trees = (2, 16) if quick else (4, 32)
    scenario = Scenario(agent(), Lognormal(2.0), trees=trees)
    rows = list[dict[str, Any]]()
    for row in cases(scenario, batches, seeds):
        rows.append(row)
        write_atomic(out_dir / "eager.json", json.dumps(jsonable({"eager": rows})))
        print(f"η = {row['staleness']}, {row['latency']}: {mean_ratio(row['ratio'])}", flush=True)
    show(report, rows, batches, seeds)
    return report.finish({"eager": rows, "seeds": seeds, "batches": batches, "trees": trees})


def cases(scenario: Scenario, batches: int, seeds: int) -> Iterator[dict[str, Any]]:
    """Eager growth and linear rollouts on the same seeds, at every spread of latencies, η = 1 and 4."""
    for staleness in (1, 4):
        period, overrides = staleness + 1, (f"flow.staleness={staleness}",)
        for latency in latencies():
            case = replace(scenario, latency=latency)
            linear, eager = (
                [grow(case, Way(recipe, overrides), batches * period, seed, period) for seed in range(seeds)]
                for recipe in ("fully-async", "eager")
            )
            pairs = list(zip(linear, eager, strict=True))
            yield {
                "staleness": staleness,
                "latency": str(latency),
                "linear_trees_per_h": [3600 * case.trees / one.result.step_s for one in linear],
                "eager_trees_per_h": [3600 * case.trees / one.result.step_s for one in eager],
                "ratio": [theirs.result.step_s / ours.result.step_s for theirs, ours in pairs],
                "fork_share": fmean(one.per_tree["fork_share"] for one in eager),
                "said_yes": fmean(one.said_yes for one in eager),
                "tool_calls_ratio": fmean(
                    ours.per_tree["tool_calls"] / theirs.per_tree["tool_calls"] for theirs, ours in pairs
                ),
            }


def show(report: Report, rows: Sequence[dict[str, Any]], batches: int, seeds: int) -> None:
    """Put the :func:`cases` into ``report``."""
    report.section(
        "Eager growth against linear rollouts",
        "Trained trees per hour under rollout.schedule=eager over those of linear rollouts with the same η, "
        f"on the same seeds (0 to {seeds - 1}): geometric mean with its standard error; {batches} (η + 1) "
        "batches after η + 1 that are left out.",
    )
    report.table(
        "Trees per hour, forks and tool calls of eager growth against linear rollouts",
        [
            "η",
            "tool latency",
            "ratio by seed",
            "mean",
            "leaves forked",
            "forks asked for",
            "tool calls",
        ],
        [
            [
                row["staleness"],
                row["latency"],
                ", ".join(f"{ratio:.2f}" for ratio in row["ratio"]),
                mean_ratio(row["ratio"]),
                f"{row['fork_share']:.0%}",
                f"{row['said_yes']:.0%}",
                f"{row['tool_calls_ratio'] - 1:+.0%}",
            ]
            for row in rows
        ],
    )


def mean_ratio(ratios: Sequence[float]) -> str:
    """Their geometric mean with its standard error."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = math.exp(fmean(logs))
    error = f" ± {mean * stdev(logs) / len(logs) ** 0.5:.2f}" if len(logs) > 1 else ""
    return f"{mean:.2f}{error}"
