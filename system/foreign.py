"""Awaiting a user's own part, which may do anything with a cancellation: our wait ends all the same.

Deadlines here do not count time in which the event loop stands still: an answer that is there is taken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

from system.errors import EspalierError
from system.text import named

LET_GO_S = 1.0  # for a part that is cancelled to close what it holds
SLICE_S = 1.0  # a deadline is waited for in slices: one in which the event loop stood still counts nothing
LATE_S = 0.5  # by which a slice is over its time where it did
MOST_LATE = 10  # slices that are not counted: a loop that is always late is merely slow

_left: set[asyncio.Task[Any]] = set()  # cancelled, and still there: kept until they end


class TooLate(EspalierError):
    """A user's own part did not answer within its deadline, and may still be at work."""


class AwakeTimeout:
    """As ``asyncio.timeout``, but seconds in which the event loop stands still are not counted.
    ``async with`` it, once.  Raises TimeoutError.
    """

    def __init__(self, within_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._slices = _Slices(within_s, self._loop.time)
        self._timeout = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return self._slices.left_s

    def lift(self) -> None:
        """Let what follows in the block take any time."""
        if self._timer is not None:
            self._timer.cancel()

    @property
    def expired(self) -> bool:
        """Whether the block was ended by it."""
        return self._timeout.expired()

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._next()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lift()
        await self._timeout.__aexit__(kind, error, trace)

    def _next(self) -> None:
        self._timer = self._loop.call_later(self._slices.begin(), self._ended)

    def _ended(self) -> None:
        self._slices.end()
        if self._slices.over:
            self._timeout.reschedule(self._loop.time())
        else:
            self._next()


async def foreign(work: Awaitable[Any], within_s: float | None = None) -> Any:
    """The value of ``work``, which runs in a task of its own; raises what it raises.

    ``within_s``: seconds that it may take (None: any time).  Those in which the event loop stands still, as
    the machine does or somebody holds it, are not counted: what answers meanwhile cannot be heard, and is not
    late for that.  Raises :class:`TooLate`.

    When this wait ends early, ``work`` is cancelled.  If it goes on regardless, it is left behind after
    ``LET_GO_S``, and whatever comes of it is forgotten.
    """
    task = asyncio.ensure_future(_contained(work))
    try:
        await _ended(task, within_s)
    except asyncio.CancelledError:
        await _let_go(task)
        raise
    if not task.done():
        await _let_go(task)
        raise TooLate(f"no answer within {within_s:g} s")
    value, error = task.result()
    if error is not None:
        raise error
    return value


class _Slices:
    """A deadline, slice by slice."""

    def __init__(self, within_s: float, clock: Callable[[], float]) -> None:
        self._left_s, self._clock = within_s, clock
        self._began = self._slice_s = 0.0
        self._late = 0

    def begin(self) -> float:
        """The seconds of the slice that begins now."""
        self._began, self._slice_s = self._clock(), min(self._left_s, SLICE_S)
        return self._slice_s

    def end(self) -> None:
        """Count the slice, unless the event loop stood still in it."""
        took_s, most_s = self._clock() - self._began, self._slice_s + LATE_S
        if took_s >= most_s and self._late < MOST_LATE:
            self._late += 1
        else:  # a loop that is a little late each time adds up to nothing
            self._left_s -= min(max(took_s, self._slice_s), most_s)
        self._slice_s = 0.0

    @property
    def over(self) -> bool:
        return self._left_s <= 0

    @property
    def left_s(self) -> float:
        """With the time of the slice that is under way taken off."""
        return max(0.0, self._left_s - min(self._clock() - self._began, self._slice_s))


async def _ended(task: asyncio.Task[Any], within_s: float | None) -> None:
    """Return when ``task`` is done, or its time is over."""
    if within_s is None:
        await asyncio.wait([task])
        return
    slices = _Slices(within_s, asyncio.get_running_loop().time)
    while not task.done() and not slices.over:
        await asyncio.wait([task], timeout=slices.begin())
        slices.end()


async def _let_go(task: asyncio.Task[Any]) -> None:
    task.cancel()
    _left.add(task)
    task.add_done_callback(_forget)
    await asyncio.wait([task], timeout=LET_GO_S)


async def _contained(work: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """Value and error of ``work``: some errors would end the event loop if they left a task, and others are
    nobody's to catch.
    """
    try:
        return await work, None
    except (SystemExit, KeyboardInterrupt) as error:
        return None, error
    except (Exception, asyncio.CancelledError):
        raise
    except BaseException as error:  # GeneratorExit, or a class of its own
        return None, RuntimeError(named(error))


def _forget(task: asyncio.Task[Any]) -> None:
    _left.discard(task)
    if not task.cancelled():
        task.exception()  # heard, or asyncio would print it
