"""What the nodes of a SLURM allocation have in common: clocks, the run directory, the driver."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOOK_S = 60.0  # for all nodes to start a program and say what they see
_STEP = 1 << 31  # from here on steps are Slurm's own: the batch script, salloc's shell
_LOOK = """
import json, os, pathlib, platform, subprocess, sys, time
try:
    seen = pathlib.Path(sys.argv[1]).read_text()
except OSError as error:
    seen = error.strerror or str(error)
try:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout.split()
except OSError:
    driver = []
told = {"task": os.environ["SLURM_PROCID"], "name": platform.node(), "seen": seen, "drivers": driver}
for _ in range(5):
    print(json.dumps(told | {"time": time.time()}), flush=True)
    time.sleep(0.1)
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
        heard, error = _ask(int(count), file.name, deadline_s)
    seen = tuple(read(lines, token) for lines in heard.values())
    return Nodes(int(count), seen, error if len(seen) < int(count) else "")


def read(lines: Sequence[tuple[float, dict[str, Any]]], token: str) -> NodeSeen:
    """From what a node says several times, and when each was heard, by this machine's clock.

    A line that comes late makes the node's clock seem to be behind: the least late one counts.
    """
    _, told = lines[0]
    drivers: list[str] = told["drivers"]
    return NodeSeen(
        told["name"],
        max(each["time"] - at for at, each in lines),
        "" if told["seen"] == token else str(told["seen"])[:200],
        drivers[0] if drivers else "",
        len(drivers),
    )


Heard = dict[str, list[tuple[float, dict[str, Any]]]]


def _ask(count: int, path: str, deadline_s: float) -> tuple[Heard, str]:
    """By task, what it said and when that came; and what srun has against those that say nothing."""
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
        return {}, f"srun: {error.strerror}"
    late = threading.Timer(deadline_s, srun.terminate)
    late.start()
    heard: Heard = {}
    said: list[str] = []
    assert srun.stdout is not None
    assert srun.stderr is not None
    listener = threading.Thread(target=said.extend, args=(srun.stderr,), daemon=True)
    listener.start()
    for line in srun.stdout:
        at = time.time()
        while line.startswith("{"):  # of two tasks that speak at once, srun may write the line's end late
            told, end = json.JSONDecoder().raw_decode(line)
            heard.setdefault(told["task"], []).append((at, told))
            line = line[end:].lstrip()
    srun.wait()
    late.cancel()
    listener.join(5)
    why = next((line.strip() for line in said if line.strip()), f"no more within {deadline_s:g} s")
    return heard, why
