"""The sandbox's own parts: removal within a limit, the count of what a program has written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from system.tools.sandbox import quota
from system.tools.sandbox.program import unfenced
from system.tools.sandbox.scratch import remove_tree
from system.tools.sandbox.settings import SandboxLimits

LIMITS = SandboxLimits(disk_mb=1)  # and 256 files
ENDED = 0  # no process has this number: one that holds no files open, whatever tests before left open in this


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "scratch"
    directory.mkdir()
    yield directory
    remove_tree(str(directory))


def excess(scratch: Path, pid: int = ENDED) -> str:
    return quota.excess(str(scratch), pid, LIMITS)


def nest(directory: Path, depth: int) -> None:
    handle = os.open(directory, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=handle)
        inner = os.open("d", os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = inner
    os.close(handle)


def test_a_removal_stops_at_its_limit_and_goes_on_later(scratch: Path) -> None:
    nest(scratch, 200)
    assert not remove_tree(str(scratch), 0.0)
    assert scratch.exists()
    assert remove_tree(str(scratch))
    assert not scratch.exists()
    assert remove_tree(str(scratch), 0.0)  # it has gone already


def test_what_is_within_the_limits(scratch: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    (scratch / "closed").mkdir(0)
    (scratch / "up").symlink_to("/")
    nest(scratch, 200)  # a chain of any depth needs no more descriptors
    (scratch / "sparse").touch()
    os.truncate(scratch / "sparse", 1 << 30)
    assert excess(scratch) == ""
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_too_many_bytes(scratch: Path) -> None:
    (scratch / "inside").mkdir()
    for i in range(3):
        (scratch / "inside" / str(i)).write_bytes(bytes(400 << 10))
    assert excess(scratch) == "the program's files took more than 1 MB"


def test_too_many_files(scratch: Path) -> None:
    for i in range(300):
        (scratch / str(i)).touch()
    assert excess(scratch) == "the program made more than 256 files and directories"


def test_files_without_a_name_count(scratch: Path) -> None:
    with tempfile.TemporaryFile(dir=scratch) as file:
        file.write(bytes(2 << 20))
        file.flush()
        assert excess(scratch) == ""
        assert "more than 1 MB" in excess(scratch, os.getpid())


def test_directories_that_would_take_all_descriptors(scratch: Path) -> None:
    place, descriptors = scratch, len(os.listdir("/proc/self/fd"))
    for _ in range(110):  # two at each step, whichever is looked into first
        place = place / "a"
        place.mkdir()
        (place.parent / "b").mkdir()
    assert "branch more than 100 times" in excess(scratch) or excess(scratch) == ""
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_scratch_directory_that_has_gone(scratch: Path) -> None:
    assert excess(scratch / "nothing") == ""


@pytest.mark.parametrize(
    ("source", "program"),
    [
        ("```python\nprint(1)\n```", "print(1)"),
        ("\n  ```py\nx = 1\n\nx\n  ```\n\n", "x = 1\n\nx"),
        ("```\nx\n```", "x"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''"),
        ("```python\nprint(1)", "print(1)"),
        ("```\n```", ""),
        ("print('''\n```python\n```\n''')", "print('''\n```python\n```\n''')"),
        ("x = 1", "x = 1"),
        ("", ""),
    ],
)
def test_a_fence_is_not_part_of_the_program(source: str, program: str) -> None:
    assert unfenced(source) == program
