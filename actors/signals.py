"""What SIGINT and SIGTERM do to a run."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Generator

from actors.conductor import Conductor


@contextlib.contextmanager
def stops_on_signals(conductor: Conductor) -> Generator[None]:
    """The first SIGINT or SIGTERM saves and stops; the second ends at once."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def handle() -> None:
        if conductor.stopping:
            task.cancel()
        else:
            conductor.progress.note("stopping: finishing the step and saving (again to stop at once)")
            conductor.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handle)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
