"""What a run's processes take of this machine's memory.

The sum of their proportional set sizes (PSS, Linux: ``Documentation/filesystems/proc.rst``): of a page that n
processes share each has an n-th.  The sizes that `top` shows (RSS) count it n times.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import psutil

EVERY_S = 3.0  # between two samples, at least
COST = 0.02  # share of a core that sampling may take: the kernel walks all pages of each process
_KB = 1024


def pss_bytes(pid: int) -> int:
    """Of one process; 0 of one that has ended or may not be looked into (another user's, or one that is
    locked up).
    """
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * _KB
    return 0


def pss_of_tree() -> int:
    """Bytes of this process and all below it; 0 where the system does not tell."""
    this = psutil.Process()
    own = pss_bytes(this.pid)
    return own and own + sum(pss_bytes(one.pid) for one in this.children(recursive=True))


async def follow(
    tell: Callable[[int], object], sample: Callable[[], int] = pss_of_tree, every_s: float = EVERY_S
) -> None:
    """Until cancelled, or until nothing is told: ``tell`` samples, taken in a thread beside the event loop.

    Where one takes long (hundreds of GB), they come more rarely.
    """
    while True:
        found, took_s = await asyncio.to_thread(_timed, sample)
        if not found:
            return
        tell(found)
        await asyncio.sleep(max(every_s, took_s / COST))


def _timed(sample: Callable[[], int]) -> tuple[int, float]:
    """A sample, and the seconds of a core that it took, the kernel's included."""
    began = time.thread_time()
    return sample(), time.thread_time() - began
