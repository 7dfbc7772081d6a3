"""What a run is doing now, as far as its directory tells: without its process being asked."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from system.observe.lease import LOOK_S, NAME

_FILES = ("metrics.jsonl", "ledger.jsonl", "events.jsonl", "summary.json", "attempts.jsonl")


@dataclass(frozen=True, slots=True)
class RunState:
    """``state``: running, finished, stopped (it may be resumed), or lost (it ended without a word)."""

    state: str
    holder: str = ""  # process and machine that write here, or did to the end
    quiet_s: float | None = None  # since anything was written; None: nothing was


def run_state(root: Path, now: float | None = None, host: str = "") -> RunState:
    """Of the run in ``root``; ``now``: unix time, ``host``: this machine's name."""
    now, host = time.time() if now is None else now, host or os.uname().nodename
    written = [when for name in _FILES if (when := _modified(root / name)) is not None]
    quiet = max(0.0, now - max(written)) if written else None
    holder = _holder(root / NAME)
    if holder:
        said = f"process {holder['pid']} on {holder['host']}"
        beat = _modified(root / NAME)
        alive = beat is not None and now - beat < LOOK_S
        if holder["host"] == host and not Path(f"/proc/{holder['pid']}").exists() and Path("/proc").is_dir():
            alive = False
        return RunState("running" if alive else "lost", said, quiet)
    return RunState("finished" if _ended(root) else "stopped", "", quiet)


def _ended(root: Path) -> bool:
    """Whether the run came to its end: one that went on from there and stopped has a model, too."""
    try:
        summary = json.loads((root / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it is not there, or is damaged
        return False
    # An older version did not say whether it had ended.
    return (root / "model").is_dir() and isinstance(summary, dict) and bool(summary.get("ended", True))


def _holder(path: Path) -> Mapping[str, object]:
    """Who wrote the lease; empty when it was given back, or was never taken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"host": str(found["host"]), "pid": int(found["pid"])}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
