"""What a command's processes use, from known lines of /proc and from real processes."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from system.bench.processes import run_to_end
from system.bench.usage import MachineTicks, ProcessStat, ProcessTree, Usage, Watch, pss_mb


def stat(pid: int, parent: int, own: int, waited: int = 0, began: int = 1) -> ProcessStat:
    return ProcessStat(pid, parent, began, own, waited)


def seen(*stats: ProcessStat) -> dict[int, ProcessStat]:
    return {one.pid: one for one in stats}


def test_a_line_of_proc_is_read_whatever_the_name() -> None:
    fields = "S 7 1 1 0 -1 4194304 1 2 3 4 50 6 70 8 20 0 1 0 999 12345 100"
    assert ProcessStat.parse(f"42 (a ) b (c)) {fields}") == ProcessStat(42, 7, 999, 56, 78)
    machine = MachineTicks.parse("cpu  10 20 30 1000 5 1 2 40 0 0\ncpu0 1 2 3\n")
    assert machine == MachineTicks(busy=63, stolen=40)


def test_a_family_counts_those_that_ended_once() -> None:
    family = ProcessTree([10])
    family.look(seen(stat(1, 0, 500), stat(10, 1, 100), stat(11, 10, 50), stat(12, 11, 20), stat(99, 1, 7)))
    assert family.ticks == 170
    assert {one.pid for one in family.alive} == {10, 11, 12}
    # 12 ended with 25 and was waited for by 11, as were short-lived ones that nobody saw: 40 in all.
    family.look(seen(stat(10, 1, 110), stat(11, 10, 60, waited=40)))
    assert family.ticks == 210
    # 11 ended and left 13, which was never seen before, to 1; 10 was told of nobody.
    family.look(seen(stat(10, 1, 120), stat(13, 1, 5)))
    assert family.ticks == 120 + 60 + 40


def test_a_process_whose_parent_ended_stays_in_the_family_and_a_new_one_of_its_pid_does_not() -> None:
    family = ProcessTree([10])
    family.look(seen(stat(10, 1, 100), stat(11, 10, 50)))
    family.look(seen(stat(11, 1, 60)))
    assert [one.pid for one in family.alive] == [11]
    assert family.ticks == 160
    family.look(seen(stat(11, 1, 3000, began=77)))
    assert family.alive == []
    assert family.ticks == 160


def test_memory_of_this_process_and_of_none(tmp_path: Path) -> None:
    mine = pss_mb(os.getpid())
    assert mine is not None
    assert 10 < mine < 10_000
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "smaps_rollup").write_text(
        "00-ff ---p\nRss:  4096 kB\nPss:  2048 kB\nPss_Dirty: 1 kB\n"
    )
    assert pss_mb(5, tmp_path) == 2.0
    assert pss_mb(6, tmp_path) == 0.0


@pytest.mark.parametrize(
    ("stolen", "foreign", "noise"),
    [
        (0.0, 0.1, ""),
        (0.05, 0.1, "5% of the processor's time was stolen"),
        (0.05, 0.5, "5% of the processor's time was stolen; others used 0.50 cores"),
    ],
)
def test_a_run_is_quiet_or_is_told_why_not(stolen: float, foreign: float, noise: str) -> None:
    assert Usage(10.0, 0.0, 5.0, 100.0, 0, stolen, foreign).noise == noise


WORKER = (
    "import time; x = bytearray(80 << 20); t = time.process_time()\nwhile time.process_time() - t < 2: pass"
)
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORKER!r}]); print('done')"


async def test_the_processor_time_and_memory_of_a_child_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "busy_parent.py").write_text(PARENT)
    monkeypatch.setattr("system.bench.usage.LOOK_S", 0.05)
    monkeypatch.setattr("system.bench.usage.MEMORY_S", 0.1)
    watch = Watch()
    await run_to_end(
        "busy_parent",
        log=tmp_path / "log",
        limit_s=60,
        variables={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": None},
        started=watch.during,
    )
    used = watch.usage()
    assert 1.5 <= used.cpu_s < 6.0  # what a process did after the last look is not seen
    assert 80 < used.peak_mb < 400
    assert used.unread == 0
    assert await watch.end() == 0


async def test_what_a_command_leaves_behind_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("system.bench.usage.END_S", 0.2)
    monkeypatch.setattr("system.bench.usage.LOOK_S", 0.02)
    code = (
        "import subprocess, sys, time\n"
        "sleeper = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "left = subprocess.Popen(sleeper, stdout=subprocess.DEVNULL, start_new_session=True)\n"
        "print(left.pid, flush=True)\n"
        "time.sleep(1)"
    )
    watch = Watch()
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    with watch.during(parent.pid):
        said, _ = await parent.communicate()
    left = psutil.Process(int(said))
    assert await watch.end() == 1
    with suppress(psutil.NoSuchProcess):
        left.wait(10)
    assert not left.is_running()
