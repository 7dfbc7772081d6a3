"""Sessions for tests, and looks at their processes."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from system.tools.sandbox.sandbox import Sandbox
from system.tools.sandbox.sessions import SandboxSession


def children(pid: int) -> list[int]:
    """Of all its threads."""
    found: list[int] = []
    with suppress(OSError):  # it may end at any moment
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                listed = Path(f"/proc/{pid}/task/{thread}/children").read_text()
                found += [int(text) for text in listed.split()]
    return found


def descendants(pid: int) -> list[int]:
    found = children(pid)
    return found + [one for child in found for one in descendants(child)]


def wardens(box: Sandbox) -> list[int]:
    """Processes of trees, the newest last."""
    assert box.pid is not None
    return [pid for pid in children(box.pid) if name(pid) == "sandbox-tree"]


def name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}/stat").exists() and state(pid) not in "ZX"]


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def scratch_directories(warden: int) -> list[str]:
    lines = Path(f"/proc/{warden}/mountinfo").read_text().splitlines()
    return [where for where in (line.split()[4] for line in lines) if where.startswith("/scratch/")]


async def text(session: SandboxSession, code: str) -> str:
    result = await session.run(code)
    assert result.status == "ok", result.text
    return result.text
