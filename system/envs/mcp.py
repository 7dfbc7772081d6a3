"""``environment=mcp``: an MCP server of its own for each live branch, for servers that keep a state.

``tools.mcp`` shares one server among all branches; this starts one where a branch begins and ends it there.
``{directory}`` in the server's command, variables or working directory stands for a directory of its own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from system.config.mcp import McpPlace, place
from system.envs.protocol import (
    Action,
    CannotFork,
    Effects,
    Environment,
    ForkKind,
    Ids,
    Message,
    Observation,
    Start,
    World,
)
from system.plugins import PluginError
from system.scratch import Scratch
from system.tools.mcp.server import McpServer
from system.tools.mcp.tools import listed, outcome
from system.tools.outcome import ToolSpec, ToolStatus
from system.tools.tool import ToolUnavailable

DIRECTORY = "{directory}"
_WHERE = "environment.options.server"


class McpEnvironment(Environment):
    """Starts servers."""

    has_result = False

    def __init__(
        self,
        server: dict[str, Any] | None = None,
        fork: Literal["copy", "replay", "none"] = "replay",
        outside: bool = False,
        ignore: list[str] | None = None,
    ) -> None:
        """``server``: as an entry of ``tools.mcp``; ``fork``: a second server with a copy of the directory,
        for one whose whole state is there; or one that is given the same calls; or not at all; ``outside``:
        its calls change what no other server takes back, so that none is ever made twice; ``ignore``:
        patterns of what may differ between two servers in the same state.  Raises ConfigError, PluginError.
        """
        self._place = place(_WHERE, server or {})
        for key in ("pure", "idempotent"):
            if getattr(self._place, key):
                raise PluginError(f"{_WHERE}.{key}: a server with a state has no such tools: leave it out")
        self._directory = _names_directory(self._place)
        if fork == "copy" and not self._directory:
            raise PluginError(f"environment.options.fork=copy: {_WHERE} does not say {DIRECTORY}")
        self.forks = {"copy": ForkKind.NATIVE, "replay": ForkKind.REPLAY, "none": ForkKind.NONE}[fork]
        self.effects = Effects.OUTSIDE if outside else Effects.SESSION
        try:
            self._ignore = [re.compile(pattern) for pattern in ignore or ()]
        except re.error as error:
            raise PluginError(f"environment.options.ignore: {error}") from error
        offered = _offered(self._place)
        self.tools: Mapping[str, ToolSpec] = {spec.name: spec for spec, _ in offered}
        self.names = {spec.name: name for spec, name in offered}  # ours -> the server's

    async def open(self, start: Start) -> World:
        directory = await _new_directory() if self._directory else None
        world = McpWorld(self, directory)
        try:
            await world.server.check()
        except BaseException:
            await world.close("it did not start")
            raise
        return world

    def normalise(self, text: str) -> str:
        for pattern in self._ignore:
            text = pattern.sub("…", text)
        return text

    def server(self, directory: Scratch | None) -> McpServer:
        """A server whose directory is this one; it starts when it is first asked something."""
        return McpServer(_filled(self._place, directory.path if directory else None))


class McpWorld(World):
    """A server, as long as it is there: where it has gone, so has its state."""

    def __init__(self, environment: McpEnvironment, directory: Scratch | None) -> None:
        self._environment, self._directory = environment, directory
        self.server = environment.server(directory)

    async def step(self, action: Action) -> Observation:
        from mcp import MCPError

        messages: list[Message] = []
        for call in action.calls:
            if self.server.gone:
                raise ToolUnavailable("its MCP server has gone")
            try:
                told = outcome(
                    await self.server.call(self._environment.names[call.tool], dict(call.arguments))
                )
            except MCPError as error:  # the server's refusal, for the model to mend
                failed = f"The tool {call.tool!r} failed: {error.message}"
                messages.append(Message(failed, status=str(ToolStatus.ERROR)))
            else:
                messages.append(Message(told.text, status=str(told.status)))
        return Observation(tuple(messages))

    async def fork(self, ids: Ids) -> World:
        """The server is ended while its files are copied, so that they are whole."""
        if self._directory is None or self.server.gone:
            raise CannotFork("its MCP server has gone")
        await self.server.close()
        self.server = self._environment.server(self._directory)
        copy = await _new_directory()
        world = McpWorld(self._environment, copy)
        try:
            places = self._directory.path, copy.path
            await asyncio.to_thread(shutil.copytree, *places, symlinks=True, dirs_exist_ok=True)
            await world.server.check()
        except BaseException as error:
            await world.close("it was not copied")
            if isinstance(error, OSError | ToolUnavailable):
                raise CannotFork(str(error)) from error
            raise
        return world

    async def close(self, why: str) -> None:
        await self.server.close()
        if self._directory is not None:
            directory, self._directory = self._directory, None
            await asyncio.to_thread(_remove, directory)


@cache
def _offered(there: McpPlace) -> tuple[tuple[ToolSpec, str], ...]:
    """The tools of a server that is started once, to ask; blocks."""
    directory = Scratch.make("mcp") if _names_directory(there) else None
    try:
        return listed(_filled(there, directory.path if directory else None))
    finally:
        if directory is not None:
            _remove(directory)


async def _new_directory() -> Scratch:
    """It goes with this process; and at once where nobody waits for it any more."""
    making = asyncio.ensure_future(asyncio.to_thread(Scratch.make, "mcp"))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(_remove_unwanted)
        raise


def _remove_unwanted(made: asyncio.Future[Scratch]) -> None:
    if not made.cancelled() and made.exception() is None:
        _remove(made.result())


def _remove(directory: Scratch) -> None:
    """What a server still writes into it is removed with those of processes that have ended."""
    shutil.rmtree(directory.path, ignore_errors=True)
    directory.release()


def _names_directory(there: McpPlace) -> bool:
    return any(DIRECTORY in text for text in (*there.command, *(value for _, value in there.env), there.cwd))


def _filled(there: McpPlace, directory: Path | None) -> McpPlace:
    if directory is None:
        return there
    put = lambda text: text.replace(DIRECTORY, str(directory))  # noqa: E731
    return dataclasses.replace(
        there,
        command=tuple(map(put, there.command)),
        env=tuple((name, put(value)) for name, value in there.env),
        cwd=put(there.cwd),
    )
