"""What the records of a finished run's training steps (``metrics.jsonl``) say, added up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from system.observe.rundir import RunDir
from system.observe.sinks import history

SKIP = 4  # training steps at the start: the pipeline fills, caches and compilers warm up

Records = Sequence[Mapping[str, Any]]


def steps_of(run: RunDir, skip: int = SKIP) -> list[dict[str, Any]]:
    """The records of training steps, without the first ``skip``."""
    return [one for one in history(run.metrics_path) if "time/window_s" in one][skip:]


def total(records: Records, key: str) -> float:
    """The sum of ``key`` over the records that have it."""
    return sum(float(one.get(key) or 0.0) for one in records)


def idle_s(records: Records) -> dict[str, dict[str, float]]:
    """Seconds that were waited: actor -> cause -> seconds."""
    found: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for key in {key for one in records for key in one if key.startswith("time/idle_s/")}:
        _, _, actor, cause = key.split("/", 3)
        found[actor][cause] = total(records, key)
    return dict(found)


def idle_shares(records: Records) -> dict[str, dict[str, float]]:
    """The same as shares of all time."""
    span = total(records, "time/window_s")
    return {
        actor: {cause: waited / span for cause, waited in causes.items()}
        for actor, causes in idle_s(records).items()
    }


def mean_over_engines(idle: Mapping[str, Mapping[str, float]], *causes: str) -> float:
    """Seconds (or shares) of ``causes``, of all causes where none is named, mean over the engines in
    ``idle``."""
    engines = [waits for actor, waits in idle.items() if actor.startswith("engine-")]
    waited = sum(one for waits in engines for cause, one in waits.items() if not causes or cause in causes)
    return waited / max(len(engines), 1)
