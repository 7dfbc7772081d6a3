"""Awaiting a user's own part, which may do anything with a cancellation, or never return: our wait ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from functools import partial
from threading import Thread
from typing import Any, TypeVar

from system.awake import AwakeTimeout
from system.errors import EspalierError
from system.text import named

T = TypeVar("T")
LET_GO_S = 1.0  # for a part that is cancelled to close what it holds

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


async def foreign(work: Awaitable[Any], within_s: float | None = None) -> Any:
    """The value of ``work``, which runs in a task of its own; raises what it raises.

    ``within_s``: seconds that it may take, without those in which the event loop stands still
    (:mod:`system.awake`); None: any time.  An answer that is there when they are over is taken.  Raises
    :class:`TooLate`.

    When this wait ends early, ``work`` is cancelled.  If it goes on regardless, it is left behind after
    ``LET_GO_S``, and whatever comes of it is forgotten.
    """
    task = asyncio.ensure_future(_contained(work))
    try:
        with contextlib.suppress(TimeoutError):  # which tells nothing of what is there by now
            async with AwakeTimeout(within_s):
                await asyncio.wait([task])
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
