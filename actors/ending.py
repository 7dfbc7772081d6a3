"""How a run's process ends: on a signal after the step under way, and soon after its report in any case."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Generator

from system.errors import INTERRUPTED
from system.flow.loop import TrainingLoop
from system.observe.progress import Progress

AT_ONCE_S = 4.0  # after a second signal
EXIT_DEADLINE_S = 60.0  # for Ray to shut down, threads to end, and the libraries' exit hooks (W&B's waits)


@contextlib.contextmanager
def stops_on_signals(training: TrainingLoop, progress: Progress) -> Generator[None]:
    """The first SIGINT or SIGTERM saves and stops; the second ends at once."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def handle() -> None:
        if training.stopping.is_set():
            task.cancel()
            exit_within(AT_ONCE_S, INTERRUPTED, explain=False)
        else:
            progress.note("stopping: finishing the step and saving (again to stop at once)")
            training.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handle)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def exit_within(deadline_s: float, code: int, explain: bool = True) -> None:
    """End this process with ``code`` after ``deadline_s`` seconds, should it still be there.

    ``explain``: it then prints what each thread waited for.  What it started ends with it: Ray's processes
    and W&B's service watch for that.
    """

    def end() -> None:
        if explain:
            print(f"espalier: the process did not end within {deadline_s:g} s: ended", file=sys.stderr)
            faulthandler.dump_traceback(sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    timer = threading.Timer(deadline_s, end)
    timer.daemon = True
    timer.start()
