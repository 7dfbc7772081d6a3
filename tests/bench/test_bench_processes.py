"""Processes that are run to their end, and end with the one that started them."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from system.bench.processes import run_to_end


def words(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess):  # the test fails below
        return process.cmdline()
    return []


async def test_a_process_is_run_to_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    await run_to_end("calendar", "2026", log=log, limit_s=60)
    assert "2026" in log.read_text()


async def test_a_process_that_fails_is_named_by_its_last_line_and_its_log(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ended with 1: .*No module named 'no'.*; see .*/log") as caught:
        await run_to_end("no.such", log=tmp_path / "log", limit_s=60)
    assert "\n" not in str(caught.value)


async def test_a_process_that_does_not_end_is_ended(tmp_path: Path) -> None:
    before = set(psutil.Process().children())
    with pytest.raises(TimeoutError, match=r"not done after 0\.5 s; see .*/log"):
        await run_to_end("http.server", "0", log=tmp_path / "log", limit_s=0.5)
    assert set(psutil.Process().children()) <= before


def test_a_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    code = (
        "import asyncio; from pathlib import Path; from system.bench.processes import run_to_end\n"
        f"asyncio.run(run_to_end('http.server', '0', log=Path({str(tmp_path / 'log')!r}), limit_s=600))"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as owner:
        until, children = time.monotonic() + 60, []
        while not (children and "http.server" in words(children[0])) and time.monotonic() < until:
            time.sleep(0.05)
            children = psutil.Process(owner.pid).children()
        owner.kill()
    ended, left = psutil.wait_procs(children, timeout=60)
    for child in left:
        child.kill()
    assert (len(ended), left) == (1, [])
