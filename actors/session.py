"""What is the same of every run: its directory, what people see of it, and its time with Ray, from the start
to the exit code, whatever ends it.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from actors.ending import EXIT_DEADLINE_S, exit_within
from actors.ray_support import StartFailed, ray_session
from system.config import Config, ConfigError
from system.doctor.adapters import chosen_targets, other_base
from system.errors import EXPECTED, FAILED, INTERRUPTED, LOST, exit_code, leaves, told
from system.observe import lease
from system.observe.jsonl import JsonlWriter
from system.observe.progress import Progress
from system.observe.recorder import Status
from system.observe.rundir import RunDir
from system.observe.terminal import shown
from system.text import described


@contextmanager
def opened(config: Config, run_dir: RunDir, lines: Iterable[str], *, new: bool) -> Generator[None]:
    """Hold the run directory for the length of the block.  People are told where it is, ``lines``, and what
    is to be said of adapters.
    """
    with lease.held(run_dir.root):
        said = [*lines, *chosen_targets(config), *(other_base(config) if new else ())]
        print(f"run directory: {run_dir.root}", *map(shown, said), sep="\n", flush=True)
        yield


def in_session(
    config: Config,
    root: Path,
    work: Callable[[bool], Coroutine[Any, Any, int]],
    again: str,
    *,
    new: bool,
    last: bool = True,
) -> int:
    """Do ``work`` (told whether Ray's cluster was given to us) while Ray is there; returns the process's exit
    code.  ``again``: the command that goes on with a run that failed.  A ``new`` run directory goes where Ray
    does not start, which raises StartFailed: nothing has happened then that it could tell.

    The process ends soon after, should anything in it hang; not before this returns, where it is not the
    ``last`` that it does.
    """
    code = FAILED
    try:
        with ray_session(config, root) as joined:
            try:
                code = asyncio.run(work(joined))
            except* ConfigError as errors:
                raise next(leaves(errors)) from None
            except* (*EXPECTED, RayError) as errors:
                code = _failed(errors, again)
            except* asyncio.CancelledError:  # by a signal
                print("espalier: interrupted", file=sys.stderr)
                code = INTERRUPTED
            finally:
                ending = exit_within(EXIT_DEADLINE_S, code)
    except StartFailed:
        if new:
            shutil.rmtree(root, ignore_errors=True)
        raise
    if not last:
        ending.cancel()
    return code


@asynccontextmanager
async def followed(
    config: Config,
    run_dir: RunDir,
    status: Callable[[], Status],
    steps: int = 0,
    beside: Sequence[Coroutine[Any, Any, None]] = (),
) -> AsyncGenerator[Progress]:
    """What people see of a run for the length of the block, kept in ``events.jsonl``.  ``steps``: those of
    the whole run, where these are what it counts.  ``beside``: is done meanwhile.
    """
    events = JsonlWriter(run_dir.events_path)
    try:
        interval_s = config.observe.progress_s
        with Progress(status, total_steps=steps, interval_s=interval_s, journal=events.write) as progress:
            tasks = [asyncio.create_task(one) for one in (progress.run(), *beside)]
            try:
                yield progress
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        events.close()


def draw_curves(run_dir: RunDir) -> None:
    """The curves; a run that cannot be drawn ends as it would."""
    from system.observe import plots  # slow import, and Ray's processes end meanwhile

    try:
        plots.draw(run_dir)
    except Exception as error:
        print(f"espalier: the curves are not drawn: {shown(described(error))}", file=sys.stderr)


def _failed(errors: BaseException, again: str) -> int:
    """Say why the run failed and how to go on; returns the exit code."""
    for error in leaves(errors):
        print(f"espalier: {shown(told(error))}", file=sys.stderr)
    code = exit_code(errors, lost=(RayError,))
    when = "" if code == LOST else "once that is mended, "
    print(f"espalier: the run failed; {when}go on with {again}", file=sys.stderr)
    return code
