"""The recorder: the conductor tells it what happened, it keeps the books.

Two kinds of book: a *window* of what happened since the last record (``flush`` turns it into one flat record
for the sinks) and the *totals* of the whole run, which survive a resume and become ``summary.json``.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from system.config import Config, to_dict
from system.observe.eval import EvalResult
from system.observe.metrics import (
    engine_metrics,
    engine_totals,
    idle_metrics,
    mean,
    rollout_metrics,
    tool_metrics,
    train_metrics,
    tree_metrics,
)
from system.observe.redact import redact
from system.observe.rundir import RunDir
from system.observe.sinks import RESUMED, Sink
from system.tree.record import Tree
from system.tree.stats import TreeStats

Which = Literal["before", "after", "during"]

QUEUE_DEPTH = "flow/queue_depth"  # gauges that the progress display looks for
GROWING = "rollout/growing"

_MOVING_BATCHES = 4  # training batches' worth of closed trees in the moving means
_RATE_WINDOW_S = 60.0


@dataclass
class Totals:
    """Counts over the whole run, resumes included."""

    trees: int = 0  # closed
    leaves: int = 0
    forks: int = 0
    top_ups: int = 0
    tool_calls: int = 0
    generated: int = 0  # MODEL tokens of closed trees, and of dropped ones as far as they are known
    trained: int = 0  # MODEL tokens that the learner saw with a scored leaf below, each once per tree
    unique_trained: int = 0  # tokens of any kind in trained trees, shared prefixes once
    flat_trained: int = 0  # the same once per leaf, as flattened paths would cost
    version: int = 0
    staleness: Counter[int] = field(default_factory=Counter)  # trained trees by versions of lag
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)  # reason -> {"trees", "leaves"}
    idle: dict[str, dict[str, float]] = field(default_factory=dict)  # actor -> cause -> seconds
    engine: dict[str, float] = field(default_factory=dict)  # requests by routing decision, cache hits, …
    tools: dict[str, float] = field(default_factory=dict)  # retries, joins, cache hits, breakers, by tool
    evals: dict[str, dict[str, Any]] = field(default_factory=dict)  # "before" | "after" -> scores
    mismatch: dict[str, float] = field(default_factory=dict)  # see ``Recorder.summary``
    weights: dict[str, float] = field(default_factory=dict)  # of pushes to engines: see ``weights_pushed``
    wall_s: float = 0.0  # of earlier sessions


@dataclass(frozen=True, slots=True)
class Status:
    """What a progress display shows.  Means are over the latest closed trees, NaN while there are none."""

    step: int = 0
    version: int = 0
    wall_s: float = 0.0
    reward: float = float("nan")
    accuracy: float = float("nan")
    staleness: float = float("nan")
    forks_per_tree: float = float("nan")
    queue_depth: int = 0
    growing: int = 0
    generated_per_s: float = 0.0  # MODEL tokens of closed trees
    trained_per_s: float = 0.0
    steps_per_s: float = 0.0
    trees: int = 0
    dropped: int = 0  # trees
    idle: Mapping[str, float] = field(default_factory=dict)  # actor -> share of this session's time
    evals: Mapping[str, float] = field(default_factory=dict)  # "before", "during", "after" -> accuracy


class Recorder:
    """Takes events, gives records to ``sinks``.  Not thread-safe: one asyncio loop drives it."""

    def __init__(
        self,
        run_dir: RunDir,
        config: Config,
        sinks: Sequence[Sink],
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._run_dir, self._config, self._sinks = run_dir, config, list(sinks)
        self._clock, self._now = clock, now
        self._started = self._flushed = clock()
        self._totals = Totals()
        self._step = 0
        self._idle_session: defaultdict[str, float] = defaultdict(float)
        self._told: dict[tuple[str, str], float] = {}  # running totals as they were told last
        self._eval_accuracy: dict[str, float] = {}
        batch_trees = max(1, config.flow.batch_leaves // config.rollout.leaves)
        self._recent: deque[TreeStats] = deque(maxlen=_MOVING_BATCHES * batch_trees)
        self._recent_lag: deque[int] = deque(maxlen=_MOVING_BATCHES * batch_trees)
        self._ticks: deque[tuple[float, int, int]] = deque()  # (time, generated, trained), for rates
        self._steps: deque[tuple[float, int]] = deque(maxlen=20)  # (time, step), for the ETA
        self._gauges_last: dict[str, float] = {}
        self._reset_window()

    # Events

    def tree_closed(self, tree: Tree, version_now: int) -> None:
        """A tree closed and goes to the replay queue; ``version_now`` is the newest weight version."""
        stats = TreeStats.of(tree)
        self._closed.append(stats)
        self._recent.append(stats)
        if stats.version_min >= 0:
            self._lag_at_close.append(max(0, version_now - stats.version_min))
        totals = self._totals
        totals.trees += 1
        totals.leaves += stats.leaves
        totals.forks += stats.forks
        totals.top_ups += stats.top_ups
        totals.tool_calls += len(stats.calls)
        totals.generated += stats.generated
        self._tick(stats.generated, 0)

    def tree_dropped(self, reason: str, leaves: int, tokens: int = 0) -> None:
        """A tree, or part of one, will never be trained on.

        ``tokens`` are MODEL tokens it had sampled, to be given only for a tree that never closed: those of a
        closed one are counted already.
        """
        entry = self._totals.dropped.setdefault(reason, {"trees": 0, "leaves": 0})
        entry["trees"] += 1
        entry["leaves"] += leaves
        self._totals.generated += tokens
        self._dropped[reason] += 1
        self._tick(tokens, 0)

    def train_step(
        self,
        step: int,
        version: int,
        trees: Sequence[Tree],
        stats: Mapping[str, float],
        staleness: Sequence[int],
    ) -> None:
        """The learner finished ``step`` and weights ``version`` exist.

        ``stats`` are its own numbers, ``staleness`` how many versions each of ``trees`` lagged behind.
        """
        trained = [TreeStats.of(tree) for tree in trees]
        self._trained += trained
        self._learner.append(dict(stats))
        self._staleness += [int(lag) for lag in staleness]
        self._recent_lag.extend(int(lag) for lag in staleness)
        self._step = step
        totals = self._totals
        totals.version = max(totals.version, version)
        totals.staleness.update(int(lag) for lag in staleness)
        tokens = sum(one.trainable for one in trained)
        totals.trained += tokens
        totals.unique_trained += sum(one.unique for one in trained)
        totals.flat_trained += sum(one.flat for one in trained)
        note_mismatch(totals.mismatch, stats)
        self._tick(0, tokens)
        self._steps.append((self._clock(), step))

    def evaluated(self, step: int, result: EvalResult, which: Which) -> None:
        """An evaluation ended; its record is written at once."""
        self._eval_accuracy[which] = result.accuracy
        if which != "during":
            self._totals.evals[which] = result.to_dict()
        self._write({"step": step, "time": self._now(), "eval/which": which, **result.metrics()})

    def weights_pushed(self, stage_s: float, pause_s: Sequence[float], sent_bytes: int) -> None:
        """New weights reached the engines: ``pause_s`` is how long each of those that were paused stood
        still, ``stage_s`` what went before while they generated.
        """
        self.gauge("weights/stage_s", stage_s)
        if pause_s:
            self.gauge("weights/pause_s", max(pause_s))
        totals = self._totals.weights
        for name, value in (
            ("pushes", 1),
            ("bytes", sent_bytes),
            ("stage_s", stage_s),
            ("pause_s", sum(pause_s)),
        ):
            totals[name] = totals.get(name, 0.0) + value
        totals["pause_s_max"] = max([totals.get("pause_s_max", 0.0), *pause_s])

    def idle(self, actor: str, cause: str, seconds: float) -> None:
        """``actor`` waited ``seconds`` for ``cause`` (say: the learner, for closed trees)."""
        causes = self._totals.idle.setdefault(actor, {})
        causes[cause] = causes.get(cause, 0.0) + seconds
        self._idle[(actor, cause)] += seconds
        self._idle_session[actor] += seconds

    def idle_total(self, actor: str, cause: str, total_s: float) -> None:
        """The same from a running total; one that fell (its counter was restarted) starts from zero again."""
        self.idle(actor, cause, self._news((actor, cause), total_s))

    def engine_total(self, client: str, name: str, total: float) -> None:
        """A running total of an engine client, or of a tool service when its name begins with ``tools/``.

        It becomes ``engine/<name>``, or ``tools/…``, summed over the clients.
        """
        news = self._news((client, f"engine/{name}"), total)
        window, totals = self._engine, self._totals.engine
        if name.startswith("tools/"):
            window, totals = self._tools, self._totals.tools
        window[name] += news
        totals[name] = totals.get(name, 0.0) + news

    def _news(self, key: tuple[str, str], total: float) -> float:
        """What a running total has grown by; one that fell was restarted."""
        told = self._told.get(key, 0.0)
        self._told[key] = total
        return total - told if total >= told else total

    def gauge(self, name: str, value: float) -> None:
        """A level at this moment (queue depth, running sequences, …); the record holds the window's mean."""
        self._gauges[name].append(float(value))
        self._gauges_last[name] = float(value)

    # Records

    def flush(self, step: int) -> dict[str, Any]:
        """Turn the window into one record, give it to the sinks, start a new window; returns the record."""
        clock, totals = self._clock(), self._totals
        elapsed = clock - self._flushed
        record: dict[str, Any] = {"step": step, "version": totals.version, "time": self._now()}
        record |= rollout_metrics(self._closed)
        record |= tree_metrics(self._closed)
        record |= tool_metrics((call for one in self._closed for call in one.calls), self._config.tools.names)
        record |= train_metrics(self._trained, _mean_by_key(self._learner), self._staleness)
        if self._lag_at_close:
            record["flow/lag_at_close"] = mean(self._lag_at_close)
        record |= {f"flow/dropped/{reason}": float(n) for reason, n in sorted(self._dropped.items())}
        if totals.generated:
            record["flow/goodput"] = totals.trained / totals.generated
        record |= {name: mean(values) for name, values in self._gauges.items()}
        record |= engine_metrics(self._engine) | self._tools
        record |= idle_metrics(self._idle, elapsed)
        record["time/wall_s"] = self.wall_s
        record["time/window_s"] = elapsed
        if elapsed > 0:
            record["time/generated_per_s"] = sum(one.generated for one in self._closed) / elapsed
            record["time/trained_per_s"] = sum(one.trainable for one in self._trained) / elapsed
            record["time/trees_per_s"] = len(self._closed) / elapsed
        self._flushed = clock
        self._reset_window()
        self._write(record)
        return record

    def summary(self) -> dict[str, Any]:
        """The run in one page, as ``summary.json`` holds it."""
        totals = self._totals
        lags = sum(totals.staleness.values())
        return {
            "eval": dict(totals.evals),
            "trees": totals.trees,
            "leaves": totals.leaves,
            "forks": totals.forks,
            "top_ups": totals.top_ups,
            "tool_calls": totals.tool_calls,
            "tokens": {
                "generated": totals.generated,
                "trained": totals.trained,
                "unique_trained": totals.unique_trained,
                "flat_trained": totals.flat_trained,
            },
            "staleness": {
                "max": max(totals.staleness, default=0),
                "mean": sum(lag * n for lag, n in totals.staleness.items()) / lags if lags else 0.0,
            },
            "versions": totals.version,
            "engine": engine_totals(totals.engine),
            "tools": {key.removeprefix("tools/"): count for key, count in sorted(totals.tools.items())},
            # Engines against learner: KL(μ‖π) over all trained tokens, staleness included, and over those
            # sampled from the very weights that were trained, where only numerics differ; nats.
            "mismatch": mismatch_means(totals.mismatch),
            "weights": dict(totals.weights),
            "dropped": {reason: dict(entry) for reason, entry in sorted(totals.dropped.items())},
            "wall_s": self.wall_s,
            "idle_s": {actor: dict(causes) for actor, causes in sorted(totals.idle.items())},
            "seed": self._config.run.seed,
            "config": redact(to_dict(self._config)),
        }

    def finish(self) -> dict[str, Any]:
        """Write ``summary.json`` and close the sinks; returns the summary."""
        summary = self.summary()
        self._run_dir.write_summary(summary)
        for sink in self._sinks:
            sink.close()
        return summary

    # State

    @property
    def wall_s(self) -> float:
        """Seconds of running, over all sessions."""
        return self._totals.wall_s + self._clock() - self._started

    @property
    def settled_accuracy(self) -> float:
        """Accuracy over the latest training batches' worth of trees; NaN until there are so many of them."""
        if len(self._recent) < (self._recent.maxlen or 0):
            return float("nan")
        return mean([float(ok) for one in self._recent for ok in one.correct])

    def status(self) -> Status:
        session = self._clock() - self._started
        recent = list(self._recent)
        generated, trained = self._rates()
        return Status(
            step=self._step,
            version=self._totals.version,
            wall_s=self.wall_s,
            reward=mean([float(r) for one in recent for r in one.reward]),
            accuracy=mean([float(ok) for one in recent for ok in one.correct]),
            staleness=mean(list(self._recent_lag)),
            forks_per_tree=mean([one.forks for one in recent]),
            queue_depth=int(self._gauges_last.get(QUEUE_DEPTH, 0)),
            growing=int(self._gauges_last.get(GROWING, 0)),
            generated_per_s=generated,
            trained_per_s=trained,
            steps_per_s=self._steps_per_s(),
            trees=self._totals.trees,
            dropped=sum(entry["trees"] for entry in self._totals.dropped.values()),
            idle={a: min(1.0, s / session) for a, s in sorted(self._idle_session.items()) if session > 0},
            evals=dict(self._eval_accuracy),
        )

    def state(self) -> dict[str, Any]:
        """The totals as JSON-able values, for a checkpoint."""
        values = dict(vars(self._totals))
        values["staleness"] = {str(lag): n for lag, n in self._totals.staleness.items()}
        values["wall_s"] = self.wall_s
        values["step"] = self._step
        return values

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; the sinks are told that later records replace those past this step."""
        values = dict(state)
        self._step = int(values.pop("step"))
        values["staleness"] = Counter({int(lag): int(n) for lag, n in values["staleness"].items()})
        self._totals = Totals(**values)
        self._eval_accuracy = {which: one["accuracy"] for which, one in self._totals.evals.items()}
        self._started = self._flushed = self._clock()
        self._write({RESUMED: self._step, "time": self._now()})

    def _reset_window(self) -> None:
        self._closed: list[TreeStats] = []
        self._trained: list[TreeStats] = []
        self._learner: list[dict[str, float]] = []
        self._staleness: list[int] = []
        self._lag_at_close: list[int] = []
        self._dropped: Counter[str] = Counter()
        self._idle: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._engine: defaultdict[str, float] = defaultdict(float)
        self._tools: defaultdict[str, float] = defaultdict(float)
        self._gauges: defaultdict[str, list[float]] = defaultdict(list)

    def _write(self, record: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(record)

    def _tick(self, generated: int, trained: int) -> None:
        now = self._clock()
        self._ticks.append((now, generated, trained))
        while self._ticks and self._ticks[0][0] < now - _RATE_WINDOW_S:
            self._ticks.popleft()

    def _rates(self) -> tuple[float, float]:
        """Generated and trained tokens per second over the last minute, or the shorter session."""
        now = self._clock()
        span = min(_RATE_WINDOW_S, now - self._started)
        if span <= 0:
            return 0.0, 0.0
        recent = [tick for tick in self._ticks if tick[0] >= now - _RATE_WINDOW_S]
        return sum(t[1] for t in recent) / span, sum(t[2] for t in recent) / span

    def _steps_per_s(self) -> float:
        if len(self._steps) < 2:
            return 0.0
        (first, low), (last, high) = self._steps[0], self._steps[-1]
        return (high - low) / (last - first) if last > first else 0.0


def _mean_by_key(stats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Several training steps in one record: the mean of each key over the steps that have it."""
    if len(stats) == 1:
        return dict(stats[0])
    keys = {key: None for one in stats for key in one}
    return {key: mean([float(one[key]) for one in stats if key in one]) for key in keys}


def note_mismatch(totals: dict[str, float], stats: Mapping[str, float]) -> None:
    """Add one training step's differences between engines and learner."""
    if "mismatch_kl" not in stats:
        return
    fresh = stats["fresh"]
    for name, value in (
        ("steps", 1.0),
        ("kl", stats["mismatch_kl"]),
        ("fresh", fresh),
        ("engine_kl", stats["engine_kl"] * fresh),
    ):
        totals[name] = totals.get(name, 0.0) + value
    worst = stats["engine_logprob_diff_max"]
    totals["engine_logprob_diff_max"] = max(totals.get("engine_logprob_diff_max", 0.0), worst)


def mismatch_means(totals: Mapping[str, float]) -> dict[str, float]:
    """What :func:`note_mismatch` added up, as means per token of a step; empty before the first step."""
    if not totals:
        return {}
    return {
        "kl": totals["kl"] / totals["steps"],
        "fresh_share": totals["fresh"] / totals["steps"],
        "engine_kl": totals["engine_kl"] / totals["fresh"] if totals["fresh"] else 0.0,
        "engine_logprob_diff_max": totals["engine_logprob_diff_max"],
    }
