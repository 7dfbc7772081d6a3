"""Processes that a benchmark starts beside its own, and the CPU time that they use.

Each ends with the process that started it, even if that is killed: Linux then sends it SIGTERM.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from system.text import one_line
from system.tools.sandbox.kernel import die_with_parent

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
    process = await _started(command, threads, stdin=pipe, stdout=pipe)
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
        await _stop(process)


async def run_to_end(
    *command: str,
    log: Path,
    limit_s: float,
    threads: int | None = None,
    python: str = sys.executable,
    variables: Mapping[str, str | None] | None = None,
    started: Callable[[int], AbstractContextManager[None]] | None = None,
) -> None:
    """``python -m`` ``command`` to its end; what it says goes to ``log``.

    ``threads``: of OpenMP; None: as many as it takes.  ``variables``: of its environment, besides this
    process's (None: not that one).  ``started``: what to do beside it, given its pid.  Raises RuntimeError if
    it fails, TimeoutError if it takes more than ``limit_s`` seconds; both name the log.
    """
    with log.open("wb") as told, ExitStack() as beside:
        process = await _started(command, threads, python, variables, stdout=told, stderr=told)
        try:
            if started is not None:
                beside.enter_context(started(process.pid))
            code = await asyncio.wait_for(process.wait(), limit_s)
        except TimeoutError as error:
            raise TimeoutError(f"it was not done after {limit_s:g} s; see {log}") from error
        finally:
            await _stop(process)
    if code:
        raise RuntimeError(f"it ended with {code}: {_last_line(log)}; see {log}")


async def _started(
    command: tuple[str, ...],
    threads: int | None,
    python: str = sys.executable,
    variables: Mapping[str, str | None] | None = None,
    **streams: Any,
) -> asyncio.subprocess.Process:
    own = os.getpid()

    def before_exec() -> None:
        die_with_parent(signal.SIGTERM)
        if os.getppid() != own:  # it was killed before
            os.kill(os.getpid(), signal.SIGTERM)

    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    for name, value in (variables or {}).items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = value
    return await asyncio.create_subprocess_exec(
        python, "-m", *command, env=environment, preexec_fn=before_exec, **streams
    )


async def _stop(process: asyncio.subprocess.Process) -> None:
    """End ``process``: politely, and if it is still there after half a minute, at once."""
    if process.returncode is None:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP_S)
        except TimeoutError:
            process.kill()
            await process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return one_line(next((line for line in reversed(lines) if line.strip()), "it said nothing"))


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds that ``process`` has used, in user mode and in the kernel."""
    times = process.cpu_times()
    return times.user + times.system
