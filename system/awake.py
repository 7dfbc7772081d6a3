"""Deadlines in seconds in which the event loop runs.

A process that is stopped, a machine that is suspended or a call that holds the loop up: meanwhile no answer
can be heard, so none is late for it.  Each event loop looks at its clock every ``TICK_S`` while anybody has a
deadline; a look that comes ``LATE_S`` late tells that it stood still since the one before.  A loop whose
clock cannot stand still (:func:`never_stands_still`) need not look.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from types import TracebackType
from typing import Self
from weakref import WeakKeyDictionary

TICK_S, LATE_S = 0.25, 0.5
# A loop that is always late is merely slow: of its standstills so many are not counted, and one more each
# REFILL_S.
MOST, REFILL_S = 10, 30.0
_ROUNDING_S = 1e-6  # of sums of times


class _Clock:
    """One event loop's clock without its standstills."""

    def __init__(self, looks: bool = True) -> None:
        self.timers = 0
        self._looks, self._ticking = looks, False
        self._looked_s = self._stood_s = self._late = 0.0

    def awake_s(self, now_s: float) -> float:
        """Seconds in which the loop ran, from some moment to ``now_s`` of its own clock."""
        if self._ticking and now_s - self._looked_s >= TICK_S + LATE_S:
            self._look(now_s)
        return now_s - self._stood_s

    def tick(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look, now and every ``TICK_S`` from now on, while there are timers."""
        now_s = loop.time()
        if self._ticking:
            self._look(now_s)
            if not self.timers:
                self._ticking = False
                return
        self._ticking, self._looked_s = True, now_s
        loop.call_later(TICK_S, self.tick, loop)

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """One more timer."""
        self.timers += 1
        if self._looks and not self._ticking:
            self.tick(loop)

    def _look(self, now_s: float) -> None:
        took_s, self._looked_s = now_s - self._looked_s, now_s
        self._late = max(0.0, self._late - took_s / REFILL_S)
        if took_s >= TICK_S + LATE_S and self._late <= MOST - 1:
            self._late += 1
            self._stood_s += took_s


_clocks: WeakKeyDictionary[asyncio.AbstractEventLoop, _Clock] = WeakKeyDictionary()


def _clock(loop: asyncio.AbstractEventLoop) -> _Clock:
    if (clock := _clocks.get(loop)) is None:
        clock = _clocks[loop] = _Clock()
    return clock


def never_stands_still(loop: asyncio.AbstractEventLoop) -> None:
    """Say so of a loop's clock before anybody has a timer there: nobody looks at it every ``TICK_S``."""
    _clocks[loop] = _Clock(looks=False)


def awake_s() -> float:
    """The time of the running event loop's clock, in seconds, without those in which the loop stood still
    while anybody had a timer or a timeout of this module.
    """
    loop = asyncio.get_running_loop()
    return _clock(loop).awake_s(loop.time())


class AwakeTimer:
    """As ``loop.call_later``, but seconds in which the event loop stands still are not counted.

    :meth:`cancel` it, also when it is over.
    """

    def __init__(self, within_s: float, when_over: Callable[[], None]) -> None:
        """Begins now, on the running event loop, and calls ``when_over`` once."""
        self._loop, self._when_over = asyncio.get_running_loop(), when_over
        self._clock: _Clock | None = _clock(self._loop)
        self._clock.begin(self._loop)
        self._until_s = self._clock.awake_s(self._loop.time()) + within_s
        self._handle = self._loop.call_later(within_s, self._look)

    @property
    def left_s(self) -> float:
        """Seconds that are left; 0 once it is cancelled."""
        return (
            0.0 if self._clock is None else max(0.0, self._until_s - self._clock.awake_s(self._loop.time()))
        )

    def cancel(self) -> None:
        self._handle.cancel()
        if self._clock is not None:
            self._clock.timers -= 1
            self._clock = None

    def _look(self) -> None:
        if (left_s := self.left_s) > _ROUNDING_S:
            self._handle = self._loop.call_later(left_s, self._look)
        else:
            self._when_over()


class AwakeTimeout:
    """As ``asyncio.timeout``, but seconds in which the event loop stands still are not counted.
    ``async with`` it, once.  Raises TimeoutError.
    """

    def __init__(self, within_s: float | None) -> None:
        """``within_s``: None: any time."""
        self._within_s, self._timeout = within_s, asyncio.timeout(None)
        self._timer: AwakeTimer | None = None

    @property
    def left_s(self) -> float:
        """Seconds that are left, within the block."""
        return math.inf if self._timer is None else self._timer.left_s

    @property
    def expired(self) -> bool:
        """Whether the block was ended by it."""
        return self._timeout.expired()

    def lift(self) -> None:
        """Let what follows in the block take any time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        if self._within_s is not None:
            self._timer = AwakeTimer(self._within_s, self._end)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lift()
        await self._timeout.__aexit__(kind, error, trace)

    def _end(self) -> None:
        self._timeout.reschedule(asyncio.get_running_loop().time())
