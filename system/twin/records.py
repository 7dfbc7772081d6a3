"""What a run's training steps have left in its records (``metrics.jsonl``), in figures.

A simulated run is recorded by the same recorder as a real one, so both are read by the same functions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from system.observe.rundir import RunDir
from system.observe.sinks import history

SKIP = 4  # training steps at the start: the pipeline fills, caches and compilers warm up

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Figures:
    """Throughput, idle time by cause, staleness, and how long trees take."""

    step_s: float  # mean time between training steps
    trees_per_hour: float  # closed
    trained_per_s: float  # MODEL tokens
    generated_per_s: float
    tree_mean_s: float  # duration of a tree
    staleness_mean: float
    idle: dict[str, dict[str, float]]  # actor -> cause -> share of time

    @classmethod
    def of(cls, records: Records, **more: Any) -> Self:
        """``records``: of the training steps that count; ``more``: what a subclass holds besides."""
        span, trees = total(records, "time/window_s"), total(records, "rollout/trees")
        durations = sum(
            float(one.get("rollout/tree_s") or 0) * float(one.get("rollout/trees") or 0) for one in records
        )
        return cls(
            step_s=span / len(records),
            trees_per_hour=3600 * trees / span,
            trained_per_s=total(records, "train/tokens") / span,
            generated_per_s=total(records, "rollout/tokens") / span,
            tree_mean_s=durations / max(trees, 1.0),
            staleness_mean=total(records, "flow/staleness") / len(records),
            idle={
                actor: {cause: waited / span for cause, waited in causes.items()}
                for actor, causes in idle_s(records).items()
            },
            **more,
        )


@dataclass(frozen=True, slots=True)
class TwinResult(Figures):
    """A simulated run.  Its first steps, which fill the pipeline, may be left out of the inherited figures
    and of ``tree_s``."""

    steps: int
    seconds: float  # virtual
    tree_s: dict[str, float]  # duration of trees: mean and percentiles
    totals: dict[str, Any]  # as in ``summary.json``
    running: float  # sequences that an engine decodes at once, mean over its steps
    events: int
    digest: str

    def per_tree(self, what: str) -> float:
        """``forks``, ``top_ups`` or ``tool_calls``, mean over all trees."""
        return self.totals[what] / max(self.totals["trees"], 1)


def steps_of(run: RunDir, skip: int = SKIP) -> list[dict[str, Any]]:
    """The records of training steps, without the first ``skip``."""
    return [one for one in history(run.metrics_path) if "time/window_s" in one][skip:]


def total(records: Records, key: str) -> float:
    """The sum of ``key`` over the records that have it."""
    return sum(float(one.get(key) or 0.0) for one in records)


def idle_s(records: Records) -> dict[str, dict[str, float]]:
    """Seconds that were waited: actor -> cause -> seconds."""
    found: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for key in sorted({key for one in records for key in one if key.startswith("time/idle_s/")}):
        _, _, actor, cause = key.split("/", 3)
        found[actor][cause] = total(records, key)
    return dict(found)


def mean_over_engines(idle: Mapping[str, Mapping[str, float]], *causes: str) -> float:
    """Seconds (or shares) of ``causes``, of all causes where none is named, mean over the engines in
    ``idle``."""
    engines = [waits for actor, waits in idle.items() if actor.startswith("engine-")]
    waited = sum(one for waits in engines for cause, one in waits.items() if not causes or cause in causes)
    return waited / max(len(engines), 1)
