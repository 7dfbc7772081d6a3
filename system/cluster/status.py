"""``espalier status``, ``cancel`` and ``logs``: a submitted run as its directory and Slurm know it."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from system.cluster import slurm
from system.cluster.submit import jobs_of
from system.config import ConfigError
from system.observe.jsonl import read_jsonl
from system.observe.rundir import RunDir, RunDirError
from system.observe.terminal import visible
from system.sft.course import Course

FOLLOW_S = 1.0


def attempts(root: Path) -> list[dict[str, Any]]:
    """The chain of attempts, oldest first: each start with, if it was recorded, its end."""
    chain: list[dict[str, Any]] = []
    for event in read_jsonl(root / "attempts.jsonl"):
        if event["event"] == "start":
            chain.append({**event, "end": None})
        elif chain and chain[-1]["attempt"] == event["attempt"]:
            chain[-1]["end"] = event
    return chain


def status(root: Path) -> str:
    """A run in a few lines: its jobs, its steps, its attempts."""
    run = RunDir.open(root)
    lines = [f"run {run.root}{' (supervised)' if run.supervised else ''}"]
    try:
        jobs = jobs_of(root)
        known = slurm.states(jobs)
        lines += [f"job {job}: {state}" for job, state in known.items()]
        lines += [f"job {job}: no longer known to Slurm" for job in jobs if not known]
    except ConfigError as error:
        lines.append(f"jobs: {error}")
    steps = [int(record["step"]) for record in read_jsonl(run.metrics_path) if "step" in record]
    chain = attempts(root)
    finished = ", finished" if chain and chain[-1]["end"] and chain[-1]["end"]["exit"] == 0 else ""
    lines.append(f"step {max(steps, default=0)} of {_steps(run) or '?'}{finished}")
    return "\n".join([*lines, *map(_attempt_line, chain)])


def _steps(run: RunDir) -> int:
    """How many there will be; 0 of a supervised run whose data are not read yet."""
    config = run.config()
    if not run.supervised:
        return config.run.steps
    facts = json.loads(run.sft_path.read_text(encoding="utf-8"))
    return Course(config.sft, facts["conversations"], config.run.seed).steps if facts else 0


def cancel(root: Path, *, now: bool) -> str:
    """Stop a run or sweep for good.  Unless ``now``, running jobs save a checkpoint first."""
    jobs = jobs_of(root)
    (root / "slurm" / "cancelled").touch()
    known = slurm.states(jobs)
    running = [job for job, state in known.items() if state == "RUNNING"]
    waiting = [job for job, state in known.items() if state.startswith("PENDING")]
    if waiting or (now and running):
        slurm.command("scancel", *waiting, *(running if now else ()))
    if running and not now:
        slurm.command("scancel", "--batch", "--signal=USR1", *running)
        return (
            f"asked {', '.join(running)} to save and stop; cancelled {', '.join(waiting) or 'no waiting job'}"
        )
    return f"cancelled {', '.join([*waiting, *running]) or 'nothing: no job is waiting or running'}"


def log_files(root: Path, attempt: int | None = None) -> list[Path]:
    """The logs of a run, one per component.  Of a submitted one: the jobs', and of an attempt (the newest,
    unless one is named) the nodes' and each actor's.
    """
    if not root.is_dir():
        raise RunDirError(f"no such run directory: {root}")
    tried = sorted((root / "attempts").glob("[0-9][0-9][0-9]"))
    if attempt is not None:
        tried = [path for path in tried if int(path.name) == attempt]
        if not tried:
            raise RunDirError(f"{root} has no attempt {attempt} yet")
    places = [root / "slurm", *(path / "logs" for path in tried[-1:]), root / "logs"]
    found = [path for place in places for path in sorted(place.glob("*.log"))]
    if not found:
        raise RunDirError(f"{root} has no logs yet")
    return found


def logs(root: Path, component: str, *, attempt: int | None, lines: int, follow: bool) -> int:
    """Print the logs whose names begin with ``component`` (empty: list them all).

    A component that has nothing to complain of prints nothing: those are only named.
    """
    files = log_files(root, attempt)
    chosen = [path for path in files if path.stem.startswith(component)]
    if not chosen:
        raise ConfigError(f"no log of {component!r}; there are: {', '.join(path.stem for path in files)}")
    written = [path for path in chosen if path.stat().st_size]
    for path in written:
        if not component:
            print(f"{path.stem:24} {path.stat().st_size:10,} bytes  {path}")
            continue
        if len(written) > 1:
            print(f"==> {path} <==")
        text = path.read_text(encoding="utf-8", errors="replace").splitlines()
        print(*map(visible, text[-lines:] if lines else text), sep="\n")
    if silent := [path.stem for path in chosen if path not in written]:
        print(f"nothing printed by {', '.join(silent)}")
    if component and not written:
        others = [path.stem for path in files if path.stat().st_size]
        print(f"there is text of {', '.join(others) or 'no component'}")
    if component and follow:
        _follow(chosen[-1])
    return 0


def _follow(path: Path) -> None:
    """Print what is appended, until interrupted."""
    with path.open(encoding="utf-8", errors="replace") as file:
        file.seek(0, 2)
        while True:
            if text := file.read():
                print(visible(text, breaks=True), end="", flush=True)
            else:
                time.sleep(FOLLOW_S)


def _attempt_line(attempt: dict[str, Any]) -> str:
    began = datetime.fromtimestamp(attempt["time"]).isoformat(" ", "seconds")
    head = f"attempt {attempt['attempt']}: job {attempt['job']} on {attempt['nodes']} since {began}"
    end = attempt["end"]
    if end is None:
        return f"{head}: no end recorded (it runs, or its first node was lost)"
    steps = f"step {attempt['trained']} to {end['trained']} in {end['time'] - attempt['time']} s"
    cause = f" ({end['cause']})" if end["cause"] else ""
    return f"{head}: {steps}, exit {end['exit']}{cause}: {end['next']}"
