"""What a simulation is asked about: throughput, idle time by cause, staleness, the tail of trees."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from system.flow.loop import FinishedStep
from system.tree.record import Tree
from system.tree.stats import TreeStats
from system.twin.clock import Trace
from system.twin.engine_model import EngineModel


@dataclass
class TwinEvents:
    """Implements :class:`system.flow.loop.RunEvents`, in virtual seconds."""

    steps: list[float] = field(default_factory=list)  # when each training step was finished
    trained: list[int] = field(default_factory=list)  # MODEL tokens of each step
    closed: list[tuple[float, float, int]] = field(default_factory=list)  # (when, its duration, tokens)
    staleness: Counter[int] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    forks: int = 0
    top_ups: int = 0
    tool_calls: int = 0
    idle: defaultdict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    marks: list[dict[str, dict[str, float]]] = field(default_factory=list)  # idle totals at each step's end
    keep_trees: bool = False
    trees: list[Tree] = field(default_factory=list)  # trained ones, if asked to keep them

    def tree_closed(self, tree: TreeStats, version_now: int) -> None:
        self.closed.append((asyncio.get_running_loop().time(), tree.seconds, tree.generated))
        self.forks += tree.forks
        self.top_ups += tree.top_ups
        self.tool_calls += len(tree.calls)

    def tree_dropped(self, reason: str, leaves: int) -> None:
        self.dropped[reason] += 1

    def idle_total(self, actor: str, cause: str, total_s: float) -> None:
        self.idle[actor][cause] = total_s

    def train_step(self, step: FinishedStep) -> None:
        now = asyncio.get_running_loop().time()
        self.steps.append(now)
        self.trained.append(sum(tree.trainable for tree in step.trees))
        self.staleness.update(step.staleness)
        self.marks.append({actor: dict(causes) for actor, causes in self.idle.items()})

    def batch(self, trees: Sequence[Tree]) -> None:
        """The trees that the learner trains on now."""
        if self.keep_trees:
            self.trees += trees


@dataclass(frozen=True, slots=True)
class TwinResult:
    """A simulated run, without its first ``skipped`` steps (which fill the pipeline)."""

    steps: int
    seconds: float  # virtual
    step_s: float  # mean time between training steps
    trees_per_hour: float  # closed
    trained_per_s: float  # MODEL tokens
    generated_per_s: float
    idle: dict[str, dict[str, float]]  # actor -> cause -> share of time
    staleness_mean: float
    staleness_max: int
    tree_s: dict[str, float]  # duration of trees: mean and percentiles
    forks_per_tree: float
    top_ups_per_tree: float
    calls_per_tree: float
    dropped: dict[str, int]
    running: float  # sequences that an engine decodes at once, mean over its steps
    retracted: int  # sequences thrown out for want of KV, or computed again after an update
    events: int
    digest: str

    @classmethod
    def of(cls, events: TwinEvents, engines: Sequence[EngineModel], trace: Trace, skipped: int) -> TwinResult:
        begin, end = events.steps[skipped - 1] if skipped else 0.0, events.steps[-1]
        span = end - begin
        within = [one for one in events.closed if begin < one[0] <= end]
        durations = np.array([seconds for _, seconds, _ in within] or [np.nan])
        lags = sum(events.staleness.values())
        trees = max(len(events.closed), 1)
        return cls(
            steps=len(events.steps),
            seconds=end,
            step_s=span / (len(events.steps) - skipped),
            trees_per_hour=3600 * len(within) / span,
            trained_per_s=sum(events.trained[skipped:]) / span,
            generated_per_s=sum(tokens for *_, tokens in within) / span,
            idle=_shares(events.marks, skipped, span),
            staleness_mean=sum(lag * n for lag, n in events.staleness.items()) / max(lags, 1),
            staleness_max=max(events.staleness, default=0),
            tree_s={
                "mean": float(durations.mean()),
                **{f"p{q}": float(np.percentile(durations, q)) for q in (50, 90, 99, 100)},
            },
            forks_per_tree=events.forks / trees,
            top_ups_per_tree=events.top_ups / trees,
            calls_per_tree=events.tool_calls / trees,
            dropped=dict(events.dropped),
            running=sum(one.generated for one in engines) / max(sum(one.steps for one in engines), 1),
            retracted=sum(one.retracted for one in engines),
            events=trace.events,
            digest=trace.digest,
        )


def _shares(marks: list[dict[str, dict[str, Any]]], skipped: int, span: float) -> dict[str, dict[str, float]]:
    """Idle seconds between two marks as shares of the time between them."""
    first = marks[skipped - 1] if skipped else {}
    return {
        actor: {
            cause: (total - first.get(actor, {}).get(cause, 0.0)) / span for cause, total in causes.items()
        }
        for actor, causes in marks[-1].items()
    }
