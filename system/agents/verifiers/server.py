"""A server of verifiers' episodes: one process that has loaded the environments, and a fork of it for each
episode at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from asyncio import StreamReader, StreamWriter
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from system.agents.process import Tail, gone
from system.agents.verifiers.command import SERVE
from system.engine.sglang import supervisor
from system.errors import EspalierError
from system.redact import redact

LIMIT = 64 << 20  # bytes of a line
GRACE_S = 2.0  # for an episode that is cancelled to give back what it holds
DRAIN_S = 0.2
FORK_S = 60.0  # for a child to be there
# Episodes of a process: verifiers keeps a client, of about a megabyte, for each address that a model has had.
LIFE = 50
AGAIN_S = 30.0  # between two tries to start it
LONGEST_PATH = 100  # of a socket, in bytes


class EpisodeFailed(EspalierError):
    """An episode, or the server, that came to no result."""


class ServerRefused(EspalierError):
    """What the server says that its user has to mend: {"error", "field"}."""

    def __init__(self, message: Mapping[str, Any]) -> None:
        super().__init__(str(message["error"]))
        self.message = message


class _Fork:
    """A fork of the server, which runs one episode at a time."""

    def __init__(self, process: int, reader: StreamReader, writer: StreamWriter) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self.episodes = 0  # that it has run

    @property
    def ended(self) -> bool:
        """Whether it is dead, which the system knows before the event loop has read the stream's end."""
        try:
            return self._reader.at_eof() or psutil.Process(self._process).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    async def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer.  Raises :class:`EpisodeFailed` where it dies."""
        self.episodes += 1
        self._writer.write(json.dumps(request).encode() + b"\n")
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()
        return await self.answer()

    async def answer(self) -> dict[str, Any]:
        try:
            line = await self._reader.readline()
        except (ConnectionError, ValueError) as error:
            raise EpisodeFailed(f"its process cannot be heard: {error}") from error
        if not line:
            raise EpisodeFailed("its process died")
        return json.loads(line)

    async def cancel(self) -> bool:
        """Ask it to give up the episode; returns whether it has, and can run another one."""
        try:
            async with asyncio.timeout(GRACE_S):
                await self.ask({"cancel": True})
        except (EpisodeFailed, TimeoutError):
            return False
        return True

    def retire(self) -> None:
        """Let it close what it holds, and end."""
        self._writer.close()

    def kill(self) -> None:
        """End it, and all that it has started."""
        self._writer.close()
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._process)
            for process in [family, *family.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


class EpisodeServer:
    """Starts with the first episode, and again with the next one after it has died."""

    def __init__(
        self,
        python: str,
        spec: Mapping[str, Any],
        environment: Mapping[str, str],
        directory: Path,
        start_s: float,
    ) -> None:
        """``environment``: its variables; ``directory``: for its socket; ``start_s``: for it to load."""
        self._python, self._spec, self._environment = python, spec, environment
        self._path, self._start_s = directory / "verifiers.socket", start_s
        self._starting = asyncio.Lock()
        self._idle: list[_Fork] = []
        self._process: Process | None = None
        self._failed: tuple[float, EspalierError] | None = None  # when it could not be started, and why

    async def run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run an episode; its answer.

        Raises :class:`EpisodeFailed` where it dies or the server cannot be started, and
        :class:`ServerRefused` for what is to be mended.  When this is cancelled, so is the episode.
        """
        child = await self._child()
        try:
            answer = await child.ask(request)
        except asyncio.CancelledError:
            kept = False
            try:
                kept = await child.cancel()
            finally:  # also where this is cancelled once more
                self._idle.append(child) if kept else child.kill()
            raise
        except EpisodeFailed as error:
            child.kill()
            await asyncio.sleep(DRAIN_S)  # for its last output to be read
            raise EpisodeFailed(f"{error}; the last output: {self.output[-500:] or 'none'}") from error
        if child.episodes < LIFE:
            self._idle.append(child)
        else:
            child.retire()
        return answer

    async def ready(self) -> None:
        """Return once the environments are loaded.  Raises as :meth:`run`."""
        async with self._starting:
            await self._start()

    async def close(self) -> None:
        """End the server and its children, whoever is left of them."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()  # its supervisor then ends all
        await gone(process)
        for child in self._idle:
            child.kill()
        self._idle = []
        for task in self._tasks:
            task.cancel()
        self._listening.close()

    @property
    def output(self) -> str:
        """The last that server and children put out."""
        return redact(self._tail.text.rstrip())

    async def _child(self) -> _Fork:
        """One that is idle, or a new one."""
        await self.ready()
        while self._idle:
            child = self._idle.pop()
            if not child.ended:
                return child
            child.kill()  # what it has started
        if not self._coming.empty():  # one that nobody waited for any more
            return self._coming.get_nowait()
        (await self._server).write(b"fork\n")
        coming = asyncio.create_task(self._coming.get())
        try:
            await asyncio.wait(
                [coming, self._over], timeout=FORK_S + self._start_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            coming.cancel()
            if coming.done() and not coming.cancelled():
                self._idle.append(coming.result())
        if not self._idle:
            why = "the server died" if self._over.done() else "no process for it came up"
            raise EpisodeFailed(f"{why}; the last output: {self.output[-500:] or 'none'}")
        return self._idle.pop()

    async def _start(self) -> None:
        """Have the server loaded."""
        clock = asyncio.get_running_loop().time
        if self._failed is not None and clock() < self._failed[0] + AGAIN_S:
            raise self._failed[1]
        try:
            if self._process is None or self._over.done():
                await self.close()
                await self._begin()
            if not self._told.done():
                await self._loaded()
        except EspalierError as error:
            await self.close()
            self._failed = clock(), error
            raise

    async def _begin(self) -> None:
        """Start the process; it connects, and is told what to load."""
        if len(os.fsencode(self._path)) > LONGEST_PATH:
            raise EpisodeFailed(f"{self._path} is too long for a socket: set TMPDIR to a shorter directory")
        self._path.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        self._server: asyncio.Future[StreamWriter] = loop.create_future()
        self._told: asyncio.Future[dict[str, Any]] = loop.create_future()
        self._over: asyncio.Future[None] = loop.create_future()  # since the server is gone
        self._coming: asyncio.Queue[_Fork] = asyncio.Queue()
        self._tail = Tail()
        self._listening = await asyncio.start_unix_server(self._connected, self._path, limit=LIMIT)
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", supervisor.__file__),
            *(self._python, "-P", SERVE, "serve", str(self._path)),
            stdin=PIPE,
            stdout=PIPE,
            stderr=STDOUT,
            env=dict(self._environment),
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._tasks = [asyncio.create_task(self._tail.read(self._process.stdout))]

    async def _loaded(self) -> None:
        """Wait until the server says that it has loaded the environments."""
        assert self._process is not None
        dead = asyncio.create_task(gone(self._process))
        try:
            await asyncio.wait([dead, self._told], timeout=self._start_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            dead.cancel()
        if not self._told.done():
            late = f"it did not load within agent.options.start_s={self._start_s:g} s"
            why = late if self._process.returncode is None else "it died"
            raise EpisodeFailed(
                f"the server of verifiers' episodes: {why}; the last output: {self.output[-500:] or 'none'}"
            )
        if "error" in self._told.result():
            raise ServerRefused(self._told.result())

    async def _connected(self, reader: StreamReader, writer: StreamWriter) -> None:
        """The server comes first, then its children."""
        hello = json.loads(await reader.readline() or b"{}")
        if "child" in hello:
            self._coming.put_nowait(_Fork(hello["child"], reader, writer))
        elif "server" in hello and not self._server.done():
            self._server.set_result(writer)
            writer.write(json.dumps(self._spec).encode() + b"\n")
            try:
                if told := await reader.readline():
                    self._told.set_result(json.loads(told))
                await reader.read()
            finally:
                self._over.set_result(None)
