"""Awaiting a user's own part, which may do anything with a cancellation, or never return: our wait ends.

Deadlines here do not count time in which the event loop stands still: an answer that is there is taken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from functools import partial
from threading import Thread
from types import TracebackType
from typing import Any, Self, TypeVar

from system.errors import EspalierError
from system.text import named

T = TypeVar("T")
LET_GO_S = 1.0  # for a part that is cancelled to close what it holds
# A deadline is waited for in slices: one in which the event loop stood still counts nothing.  Long deadlines
# have longer ones, for thousands of calls may wait at once.
SLICE_S, SLICES = 1.0, 100
LATE_S = 0.5  # by which a slice is over its time where it did
MOST_LATE = 10  # slices that are not counted: a loop that is always late is merely slow

_left: set[asyncio.Task[Any]] = set()  # cancelled, and still there: kept until they end


class TooLate(EspalierError):
    """A user's own part did not answer within its deadline, and may still be at work."""


class OwnThreads(Executor):
    """A thread for each call.  One that never returns holds up no other, and not the end of the process."""

    def __init__(self, name: str) -> None:
        """``name``: of the threads."""
        self.name, self.running = name, set[Future[Any]]()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # from here on, whoever waits may go, but the thread stays
        self.running.add(future)
        future.add_done_callback(self.running.discard)
        try:
            work = (future, partial(fn, *args, **kwargs))
            Thread(target=_fulfil, args=work, name=self.name, daemon=True).start()
        except RuntimeError as error:  # the machine has no more
            future.set_exception(error)
        return future


def in_thread(call: Callable[[], T], name: str) -> asyncio.Future[T]:
    """What ``call`` returns or raises, in a thread of its own, which goes on when nobody waits any more."""
    return asyncio.get_running_loop().run_in_executor(OwnThreads(name), call)


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
        self._left_s, self._clock, self._longest_s = within_s, clock, max(SLICE_S, within_s / SLICES)
        self._began = self._slice_s = 0.0
        self._late = 0

    def begin(self) -> float:
        """The seconds of the slice that begins now."""
        self._began, self._slice_s = self._clock(), min(self._left_s, self._longest_s)
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


def _fulfil(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except StopIteration as error:  # no asyncio future takes one: whoever waits would never be told
        future.set_exception(RuntimeError(named(error)))
    except BaseException as error:  # whatever it is, it is for whoever waits
        future.set_exception(error)


def _forget(task: asyncio.Task[Any]) -> None:
    _left.discard(task)
    if not task.cancelled():
        task.exception()  # heard, or asyncio would print it
