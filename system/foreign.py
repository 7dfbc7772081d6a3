"""Awaiting a user's own part, which may do anything with a cancellation: our wait ends all the same."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

LET_GO_S = 1.0  # for a part that is cancelled to close what it holds

_left: set[asyncio.Task[Any]] = set()  # cancelled, and still there: kept until they end


async def foreign(work: Awaitable[Any]) -> Any:
    """The value of ``work``, which runs in a task of its own; raises what it raises.

    When this wait is cancelled, so is ``work``.  If it goes on regardless, it is left behind after
    ``LET_GO_S``, and whatever comes of it is forgotten.
    """
    task = asyncio.ensure_future(_contained(work))
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        task.cancel()
        _left.add(task)
        task.add_done_callback(_forget)
        await asyncio.wait([task], timeout=LET_GO_S)
        raise
    value, error = task.result()
    if error is not None:
        raise error
    return value


async def _contained(work: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """Value and error of ``work``: some errors would end the event loop if they left a task."""
    try:
        return await work, None
    except (SystemExit, KeyboardInterrupt) as error:
        return None, error


def _forget(task: asyncio.Task[Any]) -> None:
    _left.discard(task)
    if not task.cancelled():
        task.exception()  # heard, or asyncio would print it
