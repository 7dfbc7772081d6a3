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
from system.config.lora import merging_warning
from system.evals.result import EvalResult
from system.flow.loop import FinishedStep
from system.observe.alarms import AlarmBook, Alarms, StallWatch
from system.observe.metrics import (
    Idle,
    engine_totals,
    idle_metrics,
    mean,
    mean_by_key,
    reward_totals,
    rollout_metrics,
    tool_metrics,
    train_metrics,
    tree_metrics,
)
from system.observe.rundir import RunDir
from system.observe.sinks import RESUMED, Alarm, Sink
from system.observe.spans import PhaseSpan, of_tree
from system.observe.totals import Totals, add, highest
from system.redact import redact
from system.text import one_line
from system.tree.stats import TreeStats

Which = Literal["before", "after", "during"]

QUEUE_DEPTH = "flow/queue_depth"  # gauges that the progress display looks for
GROWING = "rollout/growing"

_MOVING_BATCHES = 4  # training batches' worth of closed trees in the moving means
_RATE_WINDOW_S = 60.0


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
    dropped: int = 0  # trees
    idle: Mapping[str, float] = field(default_factory=dict)  # actor -> share, as in summary.json
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
        self._started = self._began = self._flushed = clock()
        self._totals = Totals()
        self._alarms, self._book = Alarms(self._totals.beginning), AlarmBook(self._alarm, now)
        self.stall = StallWatch(clock)
        self._step = 0
        self._told: dict[tuple[str, str], float] = {}  # running totals as they were told last
        self._accounted: dict[str, float] = {}  # actor -> up to when its idle time was told
        self._training = False  # before that, no idle time counts
        self._eval_accuracy: dict[str, float] = {}
        batch_trees = max(1, config.flow.batch_leaves // config.rollout.leaves)
        self._recent: deque[TreeStats] = deque(maxlen=_MOVING_BATCHES * batch_trees)
        self._recent_lag: deque[int] = deque(maxlen=_MOVING_BATCHES * batch_trees)
        self._ticks: deque[tuple[float, int, int]] = deque()  # (time, generated, trained), for rates
        self._steps: deque[tuple[float, int]] = deque(maxlen=20)  # (time, step), for the ETA
        self._gauges_last: dict[str, float] = {}
        self.tell: Callable[[str], object] = lambda _: None  # people, in a line
        self._told_causes: set[str] = set()  # in this session
        self._stalled = False
        self._published_s = 0.0  # since the last training step: new weights go out before it is told
        self._reset_window()

    # Events

    def training_began(self) -> None:
        """What was before (start, warm start, the first evaluation) counts for no rate and no share."""
        self._began = self._flushed = self._clock()
        self._training = True
        self._ticks.clear()
        self._reset_window()

    def tree_closed(self, tree: TreeStats, version_now: int) -> None:
        """A tree closed and goes to the replay queue; ``version_now`` is the newest weight version."""
        self._closed.append(tree)
        if tree.guide:  # what it earned, the model did not earn alone
            success = bool(tree.correct.any())
            add(self._totals.guided, trees=1, with_success=success, actions=tree.guide)
        else:
            self._recent.append(tree)
        if tree.version_min >= 0:
            self._lag_at_close.append(max(0, version_now - tree.version_min))
        totals = self._totals
        totals.trees += 1
        totals.leaves += tree.leaves
        totals.forks += tree.forks
        totals.forks_unasked += tree.unasked
        totals.top_ups += tree.top_ups
        totals.tool_calls += len(tree.calls)
        totals.generated += tree.generated
        self._ticks.append((self._clock(), tree.generated, 0))
        for kind, text in tree.mishaps:
            self.mishap(kind, text)
        generated = of_tree(tree, self._now())
        for sink in self._sinks:
            sink.span(generated)

    def mishap(self, kind: str, text: str) -> None:
        """Something went wrong that does not end the run.  The first of a kind is told."""
        kind, text = one_line(kind), redact(one_line(text))
        entry = self._totals.causes.setdefault(kind, {"count": 0, "first": text})
        entry["count"] += 1
        if kind not in self._told_causes:
            self._told_causes.add(kind)
            self.tell(f"{kind}: {text} (more of this kind are counted: causes in summary.json)")

    def look_for_stall(self) -> None:
        """Raise an alarm when the step under way takes far too long.  Call it every few seconds."""
        seconds = self.stall.look()
        raised: dict[str, str] = {}
        if seconds is not None:
            waiting, growing = (int(self._gauges_last.get(name, 0)) for name in (QUEUE_DEPTH, GROWING))
            raised["stalled"] = (
                f"no training step for {seconds:.0f} s; {waiting} closed trees wait for the learner, "
                f"{growing} trees are growing (espalier logs RUN)"
            )
        if raised and not self._stalled:
            self.mishap("warning, stalled", raised["stalled"])
        self._stalled = bool(raised)
        self._book.seen(self._step, "clock", raised)

    def actor_silent(self, text: str) -> None:
        """An actor did not answer, and was killed; whoever calls tells people."""
        text = one_line(text)
        entry = self._totals.causes.setdefault("warning, stalled actor", {"count": 0, "first": text})
        entry["count"] += 1
        self._book.once(self._step, "stalled actor", text)

    def tree_dropped(self, reason: str, leaves: int, text: str = "") -> None:
        """A tree, or part of one, will never be trained on; ``text``: what happened."""
        reason = one_line(reason)
        if text:
            self.mishap(reason, text)
        entry = self._totals.dropped.setdefault(reason, {"trees": 0, "leaves": 0})
        entry["trees"] += 1
        entry["leaves"] += leaves
        self._dropped[reason] += 1

    def train_step(self, step: FinishedStep) -> None:
        """The learner has finished a step, and its weights exist."""
        self._finished.append(step)
        self._recent_lag.extend(step.staleness)
        self._step = step.version
        totals, stats = self._totals, step.stats
        totals.version = max(totals.version, step.version)
        totals.staleness.update(step.staleness)
        totals.pools = dict(step.pools)
        tokens = sum(tree.trainable for tree in step.trees)
        totals.trained += tokens
        totals.unique_trained += sum(tree.unique for tree in step.trees)
        totals.flat_trained += sum(tree.flat for tree in step.trees)
        if "mismatch_kl" in stats:
            fresh, worst = stats["fresh"], stats["engine_logprob_diff_max"]
            kl, engine_kl = stats["mismatch_kl"], stats["engine_kl"] * fresh
            add(totals.mismatch, steps=1, kl=kl, fresh=fresh, engine_kl=engine_kl)
            highest(totals.mismatch, engine_logprob_diff_max=worst)
        took = float(stats.get("seconds", 0.0))
        self._span("train", took, self._published_s, **{"step": step.version, "train.tokens": tokens})
        self._published_s = 0.0
        self._ticks.append((self._clock(), 0, tokens))
        self._steps.append((self._clock(), step.version))

    def evaluated(
        self, step: int, result: EvalResult, which: Which, seconds: float, waited_s: float, **more: float
    ) -> dict[str, Any]:
        """An evaluation of the weights of ``step`` ended after so many ``seconds``, in ``waited_s`` of which
        training stood still; its record, with ``more`` of it, is written at once, and returned.
        """
        self._eval_accuracy[which] = result.total.accuracy
        if which != "during":
            self._totals.evals[which] = result.to_dict()
        add(self._totals.evaluation, count=1, seconds=seconds, waited_s=waited_s)
        record = {"step": step, "time": self._now(), "eval/which": which, **result.metrics()}
        spent = {"seconds": seconds, "waited_s": waited_s, **more}
        record |= {f"eval/{name}": value for name, value in spent.items()}
        self._write(record)
        return record

    def weights_pushed(self, stage_s: float, pause_s: Sequence[float], sent_bytes: int) -> None:
        """New weights reached the engines: ``pause_s`` is how long each of those that were paused stood
        still, ``stage_s`` what went before while they generated.
        """
        self.gauge("weights/stage_s", stage_s)
        self.gauge("weights/bytes", sent_bytes)
        if pause_s:
            self.gauge("weights/pause_s", max(pause_s))
        self._published_s = stage_s + max(pause_s, default=0.0)
        self._span("publish", self._published_s, **{"weights.bytes": sent_bytes})
        totals = self._totals.weights
        add(totals, pushes=1, bytes=sent_bytes, stage_s=stage_s, pause_s=sum(pause_s))
        highest(totals, pause_s_max=max(pause_s, default=0.0))

    def merged(self, kept: float) -> None:
        """Adapters were merged into weights that reached the engines, with this share of their change."""
        self.gauge("weights/lora_kept", kept)
        self._totals.weights["lora_kept"] = kept
        if warning := merging_warning(self._config, kept):
            self.mishap("warning, LoRA merged", warning)

    def model_merged(self, kept: float) -> None:
        """The same of the model that the run leaves."""
        self._totals.model["lora_kept"] = kept

    def chosen(self, step: int, by: str, value: float) -> None:
        """The model that the run leaves is that of ``step``, by a metric of its evaluation."""
        self._totals.chosen = {"step": step, "by": by, "value": value}

    def idle_total(self, actor: str, cause: str, total_s: float) -> None:
        """A running total of the seconds that ``actor`` waited for ``cause`` (say: the learner, for trees).

        One that fell (its counter was restarted) starts from zero again.  What was before
        :meth:`training_began` counts nowhere.
        """
        seconds, now = self._news((actor, cause), total_s), self._clock()
        span = now - self._accounted.get(actor, self._began)  # the time that the news is about
        self._accounted[actor] = now
        if self._training:
            for idle in (self._idle, self._totals.idle):
                idle.add(actor, cause, seconds, span)

    def running_total(self, client: str, name: str, total: float) -> None:
        """What ``client`` counted since it started; summed over the clients, it becomes ``tools/<name>``,
        ``environment/<name>``, ``agent/<name>``, ``chat/<name>`` or ``reward/<name>`` for a name that
        begins so, else ``engine/<name>``.
        """
        news = self._news((client, name), total)
        group, _, rest = name.partition("/")
        if group in ("tools", "environment", "agent", "chat"):
            add(self._tool_counts, **{name: news})
            add(getattr(self._totals, group), **{rest: news})
        elif group == "reward":
            add(self._reward_counts, **{name: news})
            add(self._totals.rewards, **{rest: news})
        else:
            add(self._engine, **{name: news})
            add(self._totals.engine, **{name: news})

    def _news(self, key: tuple[str, str], total: float) -> float:
        """What a running total has grown by; one that fell was restarted."""
        told = self._told.get(key, 0.0)
        self._told[key] = total
        return total - told if total >= told else total

    def memory_used(self, pss_bytes: int) -> None:
        """What all processes of the run take now (:mod:`.memory`)."""
        self.gauge("memory/pss_bytes", pss_bytes)
        highest(self._totals.memory, pss_mb_max=pss_bytes / 1e6)

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
        record |= tool_metrics(call for one in self._closed for call in one.calls)
        trained = [tree for one in self._finished for tree in one.trees]
        lag = [versions for one in self._finished for versions in one.staleness]
        record |= train_metrics(trained, mean_by_key([one.stats for one in self._finished]), lag)
        if self._finished:
            record |= {f"flow/pool/{name}": value for name, value in self._finished[-1].pools.items()}
        if self._lag_at_close:
            record["flow/lag_at_close"] = mean(self._lag_at_close)
        record |= {f"flow/dropped/{reason}": float(n) for reason, n in sorted(self._dropped.items())}
        if totals.generated:
            record["flow/goodput"] = totals.trained / totals.generated
        record |= {name: mean(values) for name, values in self._gauges.items()}
        record |= {f"engine/{name}": value for name, value in sorted(engine_totals(self._engine).items())}
        record |= self._tool_counts
        record |= reward_totals(self._reward_counts)
        record |= idle_metrics(self._idle)
        record["time/wall_s"] = self.wall_s
        record["time/window_s"] = elapsed
        if elapsed > 0:
            record["time/generated_per_s"] = sum(one.generated for one in self._closed) / elapsed
            record["time/trained_per_s"] = sum(one.trainable for one in trained) / elapsed
            record["time/trees_per_s"] = len(self._closed) / elapsed
        if self._finished:
            raised = dict(self._alarms.look(record))
            for name, text in raised.items():
                self.mishap(f"warning, {name}", text)
            self._book.seen(step, "figures", raised)
        self._flushed = clock
        self._reset_window()
        self._write(record)
        return record

    def summary(self) -> dict[str, Any]:
        """The run in one page, as ``summary.json`` holds it."""
        return {
            **self._totals.summary(),
            "wall_s": self.wall_s,
            "seed": self._config.run.seed,
            "config": redact(to_dict(self._config)),
        }

    def finish(self, *, ended: bool) -> dict[str, Any]:
        """Write ``summary.json`` and close the sinks; returns the summary.  ``ended``: the run came to its
        end; else it was stopped, or failed.  That of an earlier session stays where this one took up nothing.
        """
        summary = {"ended": ended, **self.summary()}
        if summary["versions"] or not self._run_dir.summary_path.exists():
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
        recent = list(self._recent)
        generated, trained = self._rates()
        return Status(
            step=self._step,
            version=self._totals.version,
            wall_s=self.wall_s,
            reward=mean([float(r) for one in recent for r in one.rewards]),
            accuracy=mean([float(ok) for one in recent for ok in one.correct]),
            staleness=mean(list(self._recent_lag)),
            forks_per_tree=mean([one.forks for one in recent]),
            queue_depth=int(self._gauges_last.get(QUEUE_DEPTH, 0)),
            growing=int(self._gauges_last.get(GROWING, 0)),
            generated_per_s=generated,
            trained_per_s=trained,
            steps_per_s=self._steps_per_s(),
            dropped=sum(entry["trees"] for entry in self._totals.dropped.values()),
            idle=self._totals.idle.shares(),
            evals=dict(self._eval_accuracy),
        )

    def state(self) -> dict[str, Any]:
        """The totals as JSON-able values, for a checkpoint."""
        return {**self._totals.state(), "wall_s": self.wall_s, "step": self._step}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; the sinks are told that later records replace those past this step."""
        values = dict(state)
        self._step, memory = int(values.pop("step")), self._totals.memory
        self._totals = Totals.restored(values)
        highest(self._totals.memory, **memory)  # of this session's start
        self._alarms, self._book = Alarms(self._totals.beginning), AlarmBook(self._alarm, self._now)
        self._eval_accuracy = {which: one["accuracy"] for which, one in self._totals.evals.items()}
        self._write({RESUMED: self._step, "time": self._now()})

    def _reset_window(self) -> None:
        self._closed: list[TreeStats] = []
        self._finished: list[FinishedStep] = []
        self._lag_at_close: list[int] = []
        self._dropped: Counter[str] = Counter()
        self._idle = Idle()
        self._engine: dict[str, float] = {}
        self._tool_counts: dict[str, float] = {}
        self._reward_counts: dict[str, float] = {}
        self._gauges: defaultdict[str, list[float]] = defaultdict(list)

    def _write(self, record: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(record)

    def _alarm(self, alarm: Alarm) -> None:
        for sink in self._sinks:
            sink.alarm(alarm)

    def _span(self, name: str, seconds: float, ago: float = 0.0, /, **attributes: str | int | float) -> None:
        """A phase of so many seconds that ended now, or a while ``ago``."""
        start = self._now() - ago - seconds
        for sink in self._sinks:
            sink.span(PhaseSpan(name, start, seconds, attributes))

    def _rates(self) -> tuple[float, float]:
        """Generated and trained tokens per second over the last minute, or since training began."""
        now = self._clock()
        while self._ticks and self._ticks[0][0] < now - _RATE_WINDOW_S:
            self._ticks.popleft()
        span = min(_RATE_WINDOW_S, now - self._began)
        if span <= 0:
            return 0.0, 0.0
        return sum(tick[1] for tick in self._ticks) / span, sum(tick[2] for tick in self._ticks) / span

    def _steps_per_s(self) -> float:
        if len(self._steps) < 2:
            return 0.0
        (first, low), (last, high) = self._steps[0], self._steps[-1]
        return (high - low) / (last - first) if last > first else 0.0
