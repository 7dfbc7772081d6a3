"""Runs as a user starts them: processes of the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from system.observe.jsonl import read_jsonl

ROOT = Path(__file__).parents[2]


class Run:
    """One ``espalier train`` (or ``sft``) process and the processes below it."""

    def __init__(self, directory: Path, arguments: list[str], command: str = "train") -> None:
        self.directory = directory
        self.log = directory.parent / f"{directory.name}.log"
        self._out = self.log.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "actors.cli.main", command, *arguments],
            cwd=ROOT,
            stdout=self._out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def find(self, wanted: Callable[[psutil.Process], bool]) -> psutil.Process:
        """A process below the run that is ``wanted``."""
        for process in self.descendants():
            try:
                if process.cmdline() and wanted(process):
                    return process
            except psutil.NoSuchProcess:
                continue
        raise AssertionError(f"no such process below the run\n{self.output()}")

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended before {what}\n{self.output()}"
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{self.output()}"
            time.sleep(0.1)

    def steps(self) -> int:
        """Training steps finished so far."""
        return sum(event["event"] == "trained" for event in self.ledger())

    def ledger(self) -> list[dict[str, Any]]:
        return list(read_jsonl(self.directory / "ledger.jsonl"))

    def wait(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s\n{self.output()}") from None

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def summary(self) -> dict[str, Any]:
        return json.loads((self.directory / "summary.json").read_text())

    def kill(self) -> None:
        """End whatever is left of it."""
        try:
            below = self.descendants()
        except psutil.NoSuchProcess:
            below = []
        for process in below:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
        self._out.close()
