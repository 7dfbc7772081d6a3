"""Whole runs through the command line, as a user starts them."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_runs import ROOT, Run

from system.bench.slow_search import slowed
from system.config import load
from system.serving import serve
from system.tasks.base import HasCorpus, make_task
from system.tools.search_index import Document, SearchIndex
from system.tools.search_server import create_app

SMALL = (
    "warmstart.steps=30",
    "warmstart.demos=300",
    "eval.questions=12",
    "observe.wandb=disabled",
    "observe.progress_s=1",
)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Start a small quickstart run with overrides, or go on with ``resume``."""
    runs: list[Run] = []

    def begin(*overrides: str, resume: Path | None = None, recipe: str = "configs/quickstart.yaml") -> Run:
        directory = resume or tmp_path / "run"
        arguments = (
            ["--resume", str(resume), *overrides]
            if resume
            else [
                recipe,
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
