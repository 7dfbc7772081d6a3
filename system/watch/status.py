"""What a run is doing now, as far as its directory tells: without its process being asked.

The times of its files are of the clock of a file server, say, or of another machine, which need not agree
with this one's.  So who looks more than once (:class:`Pulse`) goes by when a time was seen to change; only
the first look has to compare clocks.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from system.observe.lease import LOOK_S, NAME
from system.observe.terminal import visible

_FILES = ("metrics.jsonl", "ledger.jsonl", "events.jsonl", "summary.json", "attempts.jsonl")


@dataclass(frozen=True, slots=True)
class RunState:
    """``state``: running, finished, stopped (it may be resumed), or lost (it ended without a word)."""

    state: str
    holder: str = ""  # process and machine that write here, or did to the end
    quiet_s: float | None = None  # since anything was written; None: nothing was


class Pulse:
    """Seconds since a file was written, by this process's own clock from the second look on."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        """``clock``: seconds that are never set; ``wall``: unix time."""
        self._clock, self._wall = clock, wall
        self._seen: dict[str, tuple[float, float]] = {}  # (the file's time, when on ``clock`` it was written)

    def age(self, name: str, written: float) -> float:
        """Of what is called ``name`` and has the time ``written``, unix time."""
        now = self._clock()
        before = self._seen.get(name)
        if before is None:
            self._seen[name] = (written, now - max(0.0, self._wall() - written))
        elif before[0] != written:
            self._seen[name] = (written, now)
        return now - self._seen[name][1]


def run_state(root: Path, pulse: Pulse | None = None, host: str = "") -> RunState:
    """Of the run in ``root``.  ``pulse``: of the looks before, every few seconds; None: this is the first and
    only one.  ``host``: this machine's name.
    """
    pulse, host = pulse or Pulse(), host or os.uname().nodename
    written = [when for name in _FILES if (when := _modified(root / name)) is not None]
    quiet = pulse.age("records", max(written)) if written else None
    holder = _holder(root / NAME)
    if holder:
        said = visible(f"process {holder['pid']} on {holder['host']}")
        beat = _modified(root / NAME)
        alive = beat is not None and pulse.age("lease", beat) < LOOK_S
        if holder["host"] == host and not Path(f"/proc/{holder['pid']}").exists() and Path("/proc").is_dir():
            alive = False
        return RunState("running" if alive else "lost", said, quiet)
    return RunState("finished" if _ended(root) else "stopped", "", quiet)


def _ended(root: Path) -> bool:
    """Whether the run came to its end: one that went on from there and stopped has a model, too."""
    try:
        summary = json.loads((root / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # it is not there, or is damaged
        return False
    # An older version did not say whether it had ended.
    return (root / "model").is_dir() and isinstance(summary, dict) and bool(summary.get("ended", True))


def _holder(path: Path) -> Mapping[str, object]:
    """Who wrote the lease; empty when it was given back, or was never taken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"host": str(found["host"]), "pid": int(found["pid"])}
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return {}


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
