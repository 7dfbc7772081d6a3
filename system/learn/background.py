"""Work beside the training: one function on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs ``work``; a process that ends meanwhile does not wait for it."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work, self._error = work, None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def ended(self, wait: bool) -> bool:
        """Whether the work is over; ``wait`` until it is."""
        self._thread.join(None if wait else 0.0)
        return not self._thread.is_alive()

    def check(self) -> None:
        """Raise what the work, which is over, raised."""
        if self._error:
            raise self._error

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # for the thread that asks
            self._error = error
