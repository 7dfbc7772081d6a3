"""One session of a run: an ``espalier train`` process and everything below it, seen from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

GONE_S = 30.0  # for what a session started to end with it


class Session:
    """Started at once.  ``directory``: of the run; ``temporary``: in place of /tmp.

    What the process prints is appended to ``log``.
    """

    def __init__(self, words: Sequence[str], directory: Path, temporary: Path, log: Path) -> None:
        self.directory, self.log = directory, log
        self._seen: dict[psutil.Process, str] = {}  # every process that was below it, and its name
        self._log_begin = log.stat().st_size if log.exists() else 0
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "actors.cli.main", "train", *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"TMPDIR": str(temporary)},
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    def steps(self) -> int:
        """Training steps in the run's ledger, those of earlier sessions and those taken back included."""
        try:
            return (self.directory / "ledger.jsonl").read_bytes().count(b'"event": "trained"')
        except FileNotFoundError:
            return 0

    def printed(self) -> str:
        """What this session has printed so far."""
        with self.log.open("rb") as file:
            file.seek(self._log_begin)
            return file.read().decode(errors="replace")

    def below(self) -> list[psutil.Process]:
        """Every process below it; they are remembered, so that those that outlive it are found."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._seen[process] = process.name()  # Ray names its workers a little after their start
        return found

    def find(self, target: str) -> psutil.Process | None:
        """The first process that plays ``target`` (a word of :data:`system.chaos.faults.PROCESSES`)."""
        if target == "driver":
            return psutil.Process(self.process.pid) if self.process.poll() is None else None
        for process in self.below():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if _plays(process, target):
                    return process
        return None

    def interrupt(self) -> None:
        """As Ctrl-C does."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGINT)

    def clear(self) -> list[psutil.Process]:
        """Kill it if it still runs; returns Ray's agents, which notice the end of their cluster later, and
        what else has outlived it by ``GONE_S``.
        """
        self.below()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        agents = [process for process, name in self._seen.items() if name.endswith("Agent")]
        _, alive = psutil.wait_procs([one for one in self._seen if one not in agents], timeout=GONE_S)
        return agents + alive


def _plays(process: psutil.Process, target: str) -> bool:
    words = process.cmdline()
    title = words[0] if words else ""
    match target:
        case "engine":
            return title.startswith("ray::EngineActor")
        case "rollout":
            return title.startswith("ray::RolloutWorker")
        case "learner":
            return title.startswith("ray::LearnerRank")
        case "search":  # the python server has its sandbox below it, the search server nothing
            return title.startswith("ray::ToolActor") and not process.children()
        case "python":
            return title.startswith("ray::ToolActor") and bool(process.children())
        case "raylet":
            return process.name() == "raylet"
        case unknown:
            raise ValueError(f"no such process: {unknown}")


def ended(processes: Sequence[psutil.Process], seconds: float) -> list[str]:
    """Wait for their end; kills those that are left, and returns what they were."""
    _, alive = psutil.wait_procs(list(processes), timeout=seconds)
    names: list[str] = []
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(" ".join(process.cmdline()).strip()[:120] or process.name())
            process.kill()
    return names


def stop_and_go(process: psutil.Process, seconds: float) -> None:
    """SIGSTOP; after ``seconds``, SIGCONT to whatever is left of it.  Returns then, or once it is gone."""
    process.suspend()
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.is_running():
        time.sleep(0.1)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.resume()
