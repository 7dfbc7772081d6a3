"""First come, first served, also for those who come outside a coroutine and wait later."""

from __future__ import annotations

import asyncio
from typing import Self


class Spot:
    """A place in a line: ``async with`` it, once, to be served."""

    def __init__(self, before: asyncio.Future[None] | None) -> None:
        self._before = before
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Self:
        if self._before is not None and not self._before.done():
            try:
                await asyncio.wait([self._before])
            except asyncio.CancelledError:
                self.leave()
                raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Let the next one be served as soon as all before are gone; whoever left already may do it again."""
        if self._before is not None and not self._before.done():
            self._before.add_done_callback(lambda _: self.leave())
        elif not self.gone.done():
            self.gone.set_result(None)


class Line:
    """Spots in the order in which they were asked for."""

    def __init__(self) -> None:
        self._last: Spot | None = None

    def spot(self) -> Spot:
        """The place behind all others; it counts from now on."""
        self._last = Spot(None if self._last is None else self._last.gone)
        return self._last
