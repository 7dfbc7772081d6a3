"""Slurm's commands, as far as we use them.  Each has a deadline; a missing one is an error that says so."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from system.config import ConfigError

DEADLINE_S = 60.0


def sbatch(script: Path, options: Sequence[str] = ()) -> str:
    """Submit ``script``; returns the job's number.  Raises ConfigError with Slurm's own words."""
    answer = command("sbatch", "--parsable", *options, str(script))
    return answer.strip().splitlines()[-1].split(";")[0]


def states(jobs: Sequence[str]) -> dict[str, str]:
    """State of every job and array task that Slurm still knows, e.g. ``{"17_2": "RUNNING"}``."""
    found: dict[str, str] = {}
    for job in jobs:
        try:
            answer = command("scontrol", "show", "job", "-o", job)
        except ConfigError:  # forgotten: it ended some minutes ago
            continue
        for line in answer.splitlines():
            words = dict(re.findall(r"(\w+)=(\S*)", line))
            array, task = words.get("ArrayJobId"), words.get("ArrayTaskId", "")
            if array and not task.isdigit():  # the tasks that have not started yet, in one record
                for number in _numbers(task):
                    found.setdefault(f"{array}_{number}", words["JobState"])
            elif "JobState" in words:
                reason = words.get("Reason", "None")
                waits = words["JobState"] == "PENDING" and reason != "None"
                name = f"{array}_{task}" if array else words["JobId"]
                found[name] = f"PENDING ({reason})" if waits else words["JobState"]
    return found


def command(*words: str) -> str:
    """What a Slurm command prints; ConfigError with what it says on failure."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    except FileNotFoundError:
        raise ConfigError(f"{words[0]} is not in PATH: this needs a machine with Slurm's commands") from None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{words[0]} did not answer within {DEADLINE_S:.0f} s: is slurmctld up?") from None
    if done.returncode:
        raise ConfigError(f"{' '.join(words[:2])}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def _numbers(ranges: str) -> list[int]:
    """Array indices of Slurm's notation: ``0-2,5%3`` -> 0, 1, 2, 5."""
    found: list[int] = []
    for part in ranges.split("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found += range(int(first), int(last or first) + 1)
    return found
