"""Memory of a run's processes: each page once, samples beside the event loop, the highest in the summary."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from system.config import Config
from system.observe.memory import follow, pss_bytes, pss_of_tree
from system.observe.recorder import Recorder
from system.observe.rundir import RunDir
from system.observe.totals import report

MB = 1_000_000
FORKED = f"""
import os, sys
big = bytearray(os.urandom(1)) * {100 * MB}
if not os.fork():
    print("forked", flush=True)
sys.stdin.read()
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="not Linux")


@pytest.fixture
def forked() -> Iterator[int]:
    """A process of 100 MB, and a fork of it that shares them."""
    before = pss_of_tree()
    process = subprocess.Popen([sys.executable, "-c", FORKED], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"forked\n"
    yield before
    process.communicate()


def test_a_page_that_two_processes_share_counts_once(forked: int) -> None:
    grown = pss_of_tree() - forked
    assert 100 * MB < grown < 150 * MB


def test_a_process_that_has_ended_takes_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert pss_bytes(process.pid) == 0


async def test_samples_are_told_beside_the_event_loop_and_rarely_where_they_take_long() -> None:
    told: list[int] = []
    threads: set[str] = set()
    often = asyncio.Event()

    def sample() -> int:
        threads.add(threading.current_thread().name)
        return 7

    def tell(used: int) -> None:
        told.append(used)
        if len(told) == 3:
            often.set()

    task = asyncio.create_task(follow(tell, sample, every_s=0.01))
    await asyncio.wait_for(often.wait(), 60)
    task.cancel()
    assert {*told} == {7}
    assert threading.main_thread().name not in threads

    def slow() -> int:
        until = time.thread_time() + 0.1
        while time.thread_time() < until:
            pass
        return 8

    told.clear()
    first = asyncio.Event()
    rarely = asyncio.create_task(follow(lambda used: (told.append(used), first.set()), slow, every_s=0.01))
    await asyncio.wait_for(first.wait(), 60)
    await asyncio.sleep(1)
    rarely.cancel()
    assert told == [8], "0.1 s of sampling are worth 5 s"


async def test_where_the_system_does_not_tell_nothing_is_told() -> None:
    told: list[int] = []
    await follow(told.append, lambda: 0)
    assert told == []


def test_the_highest_is_in_the_summary_over_a_resume(run_dir: RunDir, config: Config) -> None:
    first, second = (Recorder(run_dir, config, []) for _ in range(2))
    assert "memory" not in first.summary()
    assert " MB" not in "".join(report(first.summary(), run_dir))
    for used in (900 * MB, 1200 * MB, 1000 * MB):
        first.memory_used(used)
    assert first.flush(0)["memory/pss_bytes"] == pytest.approx(3100 * MB / 3)
    assert first.summary()["memory"] == {"pss_mb_max": 1200}
    second.memory_used(300 * MB)
    second.restore(first.state())
    second.memory_used(400 * MB)
    assert second.summary()["memory"] == {"pss_mb_max": 1200}
    assert any(line.endswith(" s, at most 1200 MB") for line in report(second.summary(), run_dir))
