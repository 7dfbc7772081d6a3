"""Calling an author's code: a coroutine on the event loop, anything else in a thread of its own."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from threading import Thread
from typing import Any

from system.foreign import foreign
from system.text import named


class OwnThreads(Executor):
    """A thread for each call.  One that never returns holds up no other, and not the end of the process."""

    def __init__(self) -> None:
        self.running: set[Future[Any]] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # from here on, whoever waits may go, but the thread stays
        self.running.add(future)
        future.add_done_callback(self.running.discard)
        Thread(target=_fulfil, args=(future, partial(fn, *args, **kwargs)), daemon=True).start()
        return future


class Caller:
    """Calls of one object of an author's, one after another."""

    def __init__(self) -> None:
        self._threads = OwnThreads()
        self.took_s = 0.0  # of the last call

    async def call(self, within_s: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """What ``function`` returns; raises what it raises, and :class:`.TooLate` after ``within_s`` seconds.
        That, and cancelling it, leaves a thread behind that still runs (:meth:`idle`).
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            if inspect.iscoroutinefunction(function):
                return await foreign(function(*arguments), within_s)
            return await foreign(loop.run_in_executor(self._threads, function, *arguments), within_s)
        finally:
            self.took_s = loop.time() - began

    async def idle(self, within_s: float) -> bool:
        """Whether no thread of it runs any more, at the latest ``within_s`` seconds from now."""
        if running := [asyncio.wrap_future(future) for future in [*self._threads.running]]:
            await asyncio.wait(running, timeout=within_s)
        return not self._threads.running


def told(function: Callable[..., Any], take: Callable[[Any], None]) -> Callable[..., Any]:
    """``function``, after which ``take`` is called on this event loop with what it returned, whether or not
    anybody still waits for it.
    """
    loop = asyncio.get_running_loop()
    if inspect.iscoroutinefunction(function):

        async def awaited(*arguments: Any) -> Any:
            value = await function(*arguments)
            take(value)
            return value

        return awaited

    def called(*arguments: Any) -> Any:
        value = function(*arguments)
        loop.call_soon_threadsafe(take, value)
        return value

    return called


def _fulfil(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except StopIteration as error:  # no asyncio future takes one: whoever waits would never be told
        future.set_exception(RuntimeError(named(error)))
    except BaseException as error:  # whatever it is, it is for whoever waits
        future.set_exception(error)
