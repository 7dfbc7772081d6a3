"""Calling an author's code: a coroutine on the event loop, anything else in a thread of its own."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from system.foreign import OwnThreads, foreign


class Caller:
    """Calls of one object of an author's, one after another."""

    def __init__(self) -> None:
        self._threads = OwnThreads("world")
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
