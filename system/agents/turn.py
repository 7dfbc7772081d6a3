"""One answer on its way: written by one task, read by the request that asked, and by its retries."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from typing import Any

from system.agents.answer import Delta
from system.agents.messages import Refusal
from system.agents.wire import Answer


class AgentTurn:
    """What has come of an answer.  When nobody reads it any more, before it is whole, it is given up."""

    def __init__(self, key: str, prompt_tokens: int) -> None:
        self.key, self.prompt_tokens = key, prompt_tokens
        self.answer: Answer | None = None  # once it is whole
        self.refusal: Refusal | None = None  # why there will be none
        self.when_handed: Callable[[bool], None] = lambda out: None  # is told whether anybody has all of it
        self._out = 0  # how many readers were given all of it
        self._deltas: list[Delta] = []
        self._readers = 0
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def failed(self) -> bool:
        return self.refusal is not None

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Let ``work`` write it: it calls :meth:`say` and then :meth:`complete` or :meth:`fail`."""
        self._task = asyncio.create_task(work, name=f"answer {self.key}")
        return self._task

    def say(self, deltas: Sequence[Delta]) -> None:
        self._deltas += deltas
        self._tell()

    def complete(self, answer: Answer) -> None:
        self.answer = answer
        self._tell()

    def fail(self, refusal: Refusal) -> None:
        """There will be no answer, unless there is one."""
        if self.answer is None and self.refusal is None:
            self.refusal = refusal
            if self._task is not None and self._task is not asyncio.current_task():
                self._task.cancel()
            self._tell()

    async def deltas(self, patience_s: float) -> AsyncGenerator[Delta | None]:
        """All text from the beginning, until :attr:`answer` is there; None whenever there was none for
        ``patience_s`` seconds.  Raises :class:`Refusal` where there will be no answer.

        Leaving early gives the answer up, unless others read it, too.
        """
        self._readers += 1
        try:
            told = 0
            while True:
                news = self._news
                while told < len(self._deltas):
                    told += 1
                    yield self._deltas[told - 1]
                if self.refusal is not None:
                    raise self.refusal
                if self.answer is not None:
                    return
                if news is not self._news:
                    continue
                try:
                    await asyncio.wait_for(news.wait(), patience_s)
                except TimeoutError:
                    yield None
        finally:
            self._readers -= 1
            if not self._readers:
                self.fail(Refusal(499, "the client has gone away"))

    @contextlib.contextmanager
    def handing_out(self) -> Generator[None]:
        """Give a reader the last of it in the block, which raises where the reader is gone.

        It counts as handed out from the beginning: a client may go on, or be done, before the block ends.
        """
        self._out += 1
        self.when_handed(True)
        try:
            yield
        except BaseException:
            self._out -= 1
            self.when_handed(self.handed_out)
            raise

    @property
    def handed_out(self) -> bool:
        return self._out > 0

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
