"""What the nodes of a SLURM allocation have in common: clocks, the run directory, the driver."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOOK_S = 60.0  # for all nodes to start a program and say what they see
_STEP = 1 << 31  # from here on steps are Slurm's own: the batch script, salloc's shell
_LOOK = """
import json, pathlib, platform, subprocess, sys, time
try:
    seen = pathlib.Path(sys.argv[1]).read_text()
except OSError as error:
    seen = error.strerror or str(error)
try:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout.split()
except OSError:
    driver = []
print(json.dumps({"name": platform.node(), "seen": seen, "drivers": driver, "time": time.time()}), flush=True)
"""


@dataclass(frozen=True, slots=True)
class NodeSeen:
    """One node of the allocation, as a program on it sees it."""

    name: str
    clock_s: float = 0.0  # how far its clock is ahead of this machine's
    shares: str = ""  # what it has against the file that was written here; empty: it reads the same
    driver: str = ""
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class Nodes:
    """``asked``: how many the allocation has; 0: nobody was asked.  ``error``: why not all have answered."""

    asked: int = 0
    seen: tuple[NodeSeen, ...] = ()
    error: str = ""


def gather_nodes(slurm: Mapping[str, str], place: Path, deadline_s: float = LOOK_S) -> Nodes:
    """Ask every node of the allocation that this runs in, if it has several, by one ``srun``.

    A file is written into ``place`` for the time.  Not within a step: every task of it would ask.
    """
    count = slurm.get("SLURM_JOB_NUM_NODES", "")
    step = slurm.get("SLURM_STEP_ID", "")
    if not count.isdigit() or int(count) < 2 or (step.isdigit() and int(step) < _STEP):
        return Nodes()
    token = secrets.token_hex(16)
    with tempfile.NamedTemporaryFile("w", dir=place, prefix=".doctor-") as file:
        file.write(token)
        file.flush()
        lines, error = _ask(int(count), file.name, deadline_s)
    return Nodes(int(count), tuple(read(line, at, token) for at, line in lines), error)


def read(line: str, at: float, token: str) -> NodeSeen:
    """From what a node says, and when it was heard, by this machine's clock."""
    told: dict[str, Any] = json.loads(line)
    drivers: list[str] = told["drivers"]
    return NodeSeen(
        told["name"],
        told["time"] - at,
        "" if told["seen"] == token else str(told["seen"])[:200],
        drivers[0] if drivers else "",
        len(drivers),
    )


def _ask(count: int, path: str, deadline_s: float) -> tuple[list[tuple[float, str]], str]:
    """(when it came, line) for each node that answers, and what srun has against the others."""
    options = ["--overlap", "--unbuffered", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1"]
    try:
        srun = subprocess.Popen(
            ["srun", *options, sys.executable, "-c", _LOOK, path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    except OSError as error:
        return [], f"srun: {error.strerror}"
    late = threading.Timer(deadline_s, srun.terminate)
    late.start()
    heard: list[tuple[float, str]] = []
    said: list[str] = []
    assert srun.stdout is not None
    assert srun.stderr is not None
    listener = threading.Thread(target=said.extend, args=(srun.stderr,), daemon=True)
    listener.start()
    for line in srun.stdout:
        if line.startswith("{"):
            heard.append((time.time(), line))
    srun.wait()
    late.cancel()
    listener.join(5)
    if len(heard) == count:
        return heard, ""
    why = next((line.strip() for line in said if line.strip()), f"no more within {deadline_s:g} s")
    return heard, why
