"""How a run's process ends: on a signal after the step under way, and soon after its report in any case."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from typing import Protocol

from system.errors import INTERRUPTED
from system.observe.progress import Progress

AT_ONCE_S = 4.0  # after a second signal
CLEAN_S = 10.0  # after a first one during the start
EXIT_DEADLINE_S = 60.0  # for Ray to shut down, threads to end, and the libraries' exit hooks (W&B's waits)


class Stoppable(Protocol):
    """What goes on until it is asked to stop: it finishes its step then."""

    stopping: asyncio.Event

    def stop(self) -> None: ...


class Signals:
    """SIGINT, SIGTERM and SIGHUP during a run: the first stops it in order, a further one ends it at once."""

    def __init__(self) -> None:
        # Asks for an orderly end; false where there is none to ask for: nothing has begun, or it was asked.
        self.stop: Callable[[], bool] = lambda: False

    def stops(self, training: Stoppable, progress: Progress) -> None:
        """From now on there is something to save."""

        def stop() -> bool:
            if training.stopping.is_set():
                return False
            progress.note("stopping: finishing the step and saving (again to stop at once)")
            training.stop()
            return True

        self.stop = stop


@contextlib.contextmanager
def signals() -> Generator[Signals]:
    """For the length of the block, which is the current task's.

    Without an orderly end the task is cancelled, and what still waits then, for a thread perhaps, is left.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    found, asked = Signals(), 0

    def handle() -> None:
        nonlocal asked
        asked += 1
        if not found.stop():
            task.cancel()
            exit_within(AT_ONCE_S if asked > 1 else CLEAN_S, INTERRUPTED, explain=False)

    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # by nohup, say
    numbers = [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]
    for number in numbers:
        loop.add_signal_handler(number, handle)
    try:
        yield found
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
            if asked:  # what comes now only tidies up
                signal.signal(number, _end_at_once)


def _end_at_once(*_: object) -> None:
    exit_within(AT_ONCE_S, INTERRUPTED, explain=False)


def exit_within(deadline_s: float, code: int, explain: bool = True) -> threading.Timer:
    """End this process with ``code`` after ``deadline_s`` seconds, should it still be there, unless what is
    returned is cancelled.

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
    return timer
