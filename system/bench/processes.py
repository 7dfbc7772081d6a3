"""Processes that a benchmark starts beside its own, and the CPU time that they use."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import psutil

_START_S = 120.0
_STOP_S = 30.0


@asynccontextmanager
async def server(
    *command: str, standard_input: bytes = b"", threads: int = 1
) -> AsyncGenerator[tuple[str, psutil.Process]]:
    """``python -m`` ``command`` for as long as the context lasts: its URL, and the process.

    The first line that it prints must end in the URL.  Raises RuntimeError if it ends before that,
    TimeoutError if it takes more than two minutes.
    """
    pipe = asyncio.subprocess.PIPE
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *command, env=environment, stdin=pipe, stdout=pipe
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(standard_input)
        process.stdin.close()
        line = await asyncio.wait_for(process.stdout.readline(), _START_S)
        if not line:
            raise RuntimeError(f"{' '.join(command)} ended before it served; see what it wrote above")
        yield line.split()[-1].decode(), psutil.Process(process.pid)
    finally:
        await stop(process)


async def stop(process: asyncio.subprocess.Process) -> None:
    """End ``process``: politely, and if it is still there after half a minute, at once."""
    if process.returncode is None:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP_S)
        except TimeoutError:
            process.kill()
            await process.wait()


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds that ``process`` has used, in user mode and in the kernel."""
    times = process.cpu_times()
    return times.user + times.system
