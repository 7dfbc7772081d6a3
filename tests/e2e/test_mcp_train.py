"""A whole run whose tools are those of MCP servers that others wrote, one of which is killed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from system.observe.jsonl import read_jsonl
from system.tree.store import read_trees

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]


def words(process: psutil.Process) -> list[str]:
    """What it was started with; nothing of one that ends meanwhile, whosever it is."""
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def test_a_run_goes_on_when_an_mcp_server_is_killed(
    start: Callable[..., Any], everything: Path, mcp_http: Any
) -> None:
    """``search`` over HTTP and ``python`` over stdio: both echo.  That answers no question, so what is looked
    at is what was called, and what became of it.
    """
    mcp_http.start()
    command = [shutil.which("node"), str(everything), "stdio"]
    run = start(
        "run.steps=6",
        "tools.names=[]",
        f"tools.mcp=[{{url: '{mcp_http.url}', include: [echo], names: {{echo: search}}}}, "
        f"{{command: {command}, include: [echo], names: {{echo: python}}}}]",
    )
    run.wait_for(lambda: run.steps() >= 2, 240, "two steps")
    killed = [one for one in run.descendants() if words(one) == command]
    assert killed
    for process in killed:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert run.wait(240) == 0, run.output()
    assert run.summary()["versions"] == 6
    steps = [record for record in read_jsonl(run.directory / "metrics.jsonl") if "train/loss" in record]
    assert len(steps) == 6
    calls = [call for tree in read_trees(run.directory / "trees") for call in tree.calls]
    for tool in ("search", "python"):
        assert sum(call.tool == tool and call.status == "ok" for call in calls) > 10
    assert not [one for one in psutil.process_iter() if words(one) == command], "no server may be left"
