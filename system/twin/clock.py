"""Virtual time for asyncio: the same coroutines, deadlines and sleeps, without waiting for any of them; and a
trace of what happened in it.

A discrete-event simulation in the textbook sense: whenever no callback is ready, the clock jumps to the next
scheduled timer.  The digital twin and the tests of the rollouts run on it, so a 120 s tool call costs nothing
and the order of events depends on the program alone, never on the machine.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import selectors
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from system.awake import never_stands_still
from system.errors import EspalierError

T = TypeVar("T")
_RESOLUTION_S = 1e-9


class Deadlock(EspalierError, RuntimeError):
    """Every task waits for another one: nothing is ready and no timer is pending."""


class _NeverBlocks(selectors.SelectSelector):
    """A selector that spends its timeout in virtual time and never reports I/O, of which there is none."""

    def __init__(self, advance: Callable[[float | None], None]) -> None:
        super().__init__()
        self._advance = advance

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._advance(timeout)
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose :meth:`time` (seconds) starts at 0 and moves only when nothing else can.

    Deterministic: callbacks run in the order in which they became ready, timers in the order of their times.
    Sockets and pipes never become ready.  :meth:`run_in_executor` (hence ``asyncio.to_thread``) calls the
    function on the spot, in no virtual time: a real thread would finish at a moment that virtual time
    cannot name.

    Raises :class:`Deadlock` out of ``run_until_complete`` when nothing is ready and nothing is scheduled.
    """

    def __init__(self, stands_still: bool = False) -> None:
        """``stands_still``: whether a test may put the clock forward, past what it is to do."""
        self._now = 0.0
        super().__init__(_NeverBlocks(self._advance))
        if not stands_still:
            never_stands_still(self)

    def time(self) -> float:
        return self._now

    def _advance(self, timeout: float | None) -> None:
        if timeout is None:
            raise Deadlock(f"at t={self._now:g} s no task is ready and no timer is pending")
        self._now += max(timeout, 0.0)
        # The loop calls what is due before now and this: of large numbers it must not be lost in rounding.
        self._clock_resolution = max(_RESOLUTION_S, math.ulp(self._now))

    def run_in_executor(  # type: ignore[override]  # the base class promises a future of the same kind
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def run(main: Coroutine[Any, Any, T], stands_still: bool = False) -> T:
    """``asyncio.run`` in virtual time: run ``main`` to its end, cancel what it left, return its result.
    ``stands_still``: as :class:`VirtualTimeLoop` has it.
    """
    with asyncio.Runner(loop_factory=partial(VirtualTimeLoop, stands_still)) as runner:
        return runner.run(main)


class Trace:
    """A running hash of events and their virtual times, in order.  Equal digests mean the same events at the
    same times, to a microsecond, so two simulations can be compared event by event.  (Timers of one moment
    fire at the time of the first: what else is timed, a deadline say, moves others by a sum's rounding.)"""

    def __init__(self) -> None:
        self.events = 0
        self._hash = hashlib.blake2b(digest_size=16)

    def note(self, *event: Any) -> None:
        """``event``: a kind, and what identifies it; anything with a stable ``repr``."""
        now = asyncio.get_running_loop().time()
        self._hash.update(f"{now:.6f} {event!r}\n".encode())
        self.events += 1

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()
