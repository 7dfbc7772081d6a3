"""Whole runs through the command line, as a user starts them."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from system.bench.slow_search import slowed
from system.config import load
from system.observe.jsonl import read_jsonl
from system.serving import serve
from system.tasks.base import HasCorpus, make_task
from system.tools.search_index import Document, SearchIndex
from system.tools.search_server import create_app

ROOT = Path(__file__).parents[2]
SMALL = (
    "warmstart.steps=30",
    "warmstart.demos=300",
    "eval.questions=12",
    "observe.wandb=disabled",
    "observe.progress_s=1",
)


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


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Start a small quickstart run with overrides, or go on with ``resume``."""
    runs: list[Run] = []

    def begin(*overrides: str, resume: Path | None = None) -> Run:
        directory = resume or tmp_path / "run"
        arguments = (
            ["--resume", str(resume), *overrides]
            if resume
            else [
                "configs/quickstart.yaml",
                f"run.dir={tmp_path}",
                f"run.name={directory.name}",
                *SMALL,
                *overrides,
            ]
        )
        runs.append(Run(directory, arguments))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


class SearchGate:
    """A search server for quickstart runs that never answers one search of the test's choice."""

    def __init__(self) -> None:
        self.url = ""
        self.held = False
        self._wanted = False

    def hold_next(self) -> None:
        self._wanted = True

    def seconds(self, query: bytes) -> float:
        if not self._wanted:
            return 0.0
        self._wanted, self.held = False, True
        return 3600.0


@pytest.fixture
def search_gate() -> Iterator[SearchGate]:
    gate = SearchGate()
    task = make_task(load(ROOT / "configs" / "quickstart.yaml"))
    assert isinstance(task, HasCorpus)
    app = slowed(create_app(SearchIndex.build(Document(**row) for row in task.corpus())), gate.seconds)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(serve(app), loop).result(30)
    gate.url = server.url
    yield gate
    asyncio.run_coroutine_threadsafe(server.close(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)
    loop.close()
