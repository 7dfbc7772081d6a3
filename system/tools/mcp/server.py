"""A connection to one MCP server: opened, listed, called, and opened anew when the server has gone.

The SDK wants a connection to be left by the task that entered it.  So each is owned by a task of its own,
which enters, hands the session out, waits until it is to leave, and leaves; calls come from any task.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO

from system.awake import AwakeTimeout
from system.config.mcp import McpPlace
from system.errors import EspalierError
from system.text import named
from system.tools.tool import ToolUnavailable

if TYPE_CHECKING:
    from mcp import ClientSession
    from mcp.types import CallToolResult, Tool

_PING_S = 3.0  # for a server to show that it lives, after a call that did not end
_LEAVE_S = 10.0  # for a connection to be closed; the SDK gives a process 2 s before it kills it
_SAID_CHARS = 400  # of what a server that does not start wrote to its stderr
_HTTP_S = 30.0  # to reach a server and write to it; what it answers, a call's deadline bounds
_PAGES = 100  # of a list of tools


class McpMissing(EspalierError, RuntimeError):
    """The SDK is not installed; the message says how to get it."""

    def __init__(self) -> None:
        super().__init__("tools.mcp needs the MCP SDK, which is not installed: pip install 'espalier[mcp]'")


@dataclass(eq=False)
class _Connection:
    """One opening of a server."""

    session: asyncio.Future[ClientSession]
    leave: asyncio.Event = field(default_factory=asyncio.Event)
    owner: asyncio.Task[None] | None = None
    doubted: bool = False  # a call did not end: the server may hang

    @property
    def over(self) -> bool:
        return self.leave.is_set() or (self.owner is not None and self.owner.done())


class McpServer:
    """One server for the tasks of one event loop; ``close`` it."""

    def __init__(self, place: McpPlace) -> None:
        self.place = place
        self.starts = 0
        self._connection: _Connection | None = None
        self._mending: asyncio.Task[_Connection] | None = None
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def gone(self) -> bool:
        """Whether it was there, and the next call would start or reach it anew."""
        return self.starts > 0 and (self._connection is None or self._connection.over)

    async def tools(self) -> list[Tool]:
        """All it offers.  Raises :class:`ToolUnavailable`."""
        session, found, cursor = (await self._connected()).session.result(), [], None
        from mcp.types import PaginatedRequestParams

        async with self._its("list of tools"):
            for _ in range(_PAGES):
                page = await session.list_tools(params=PaginatedRequestParams(cursor=cursor))
                found += page.tools
                cursor = page.next_cursor
                if not cursor:
                    break
        return found

    async def call(self, tool: str, arguments: dict[str, Any]) -> CallToolResult:
        """Raises :class:`ToolUnavailable` where the server is not there or goes, and the SDK's ``MCPError``
        for what the server refuses.  A call that is cancelled makes the next one look whether it still lives.
        """
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED, CallToolResult

        connection = await self._connected()
        try:
            result = await connection.session.result().call_tool(tool, arguments)
        except asyncio.CancelledError:
            connection.doubted = True
            raise
        except MCPError as error:
            if error.code != CONNECTION_CLOSED:
                raise
            self._drop(connection)
            raise ToolUnavailable(f"{self.place.name}: the MCP server has gone") from error
        assert isinstance(result, CallToolResult)  # the SDK raises for others
        return result

    async def check(self) -> None:
        """Raises :class:`ToolUnavailable` unless it answers."""
        connection = await self._connected()
        if not await self._lives(connection):
            self._drop(connection)
            raise ToolUnavailable(f"{self.place.name}: the MCP server does not answer")

    async def close(self) -> None:
        if self._mending is not None:
            self._mending.cancel()
            await asyncio.gather(self._mending, return_exceptions=True)
        if self._connection is not None:
            self._drop(self._connection)
        await asyncio.gather(*self._leaving, return_exceptions=True)

    async def _connected(self) -> _Connection:
        """A connection that is open, and has answered since the last call that did not end.

        To get one may take longer than a call has: it goes on without whoever asked for it first.
        """
        connection = self._connection
        if connection is not None and not connection.over and not connection.doubted:
            return connection
        if self._mending is None:
            self._mending = asyncio.create_task(self._mend(), name=f"opening MCP server {self.place.name}")
            self._mending.add_done_callback(self._mended)
        return await asyncio.shield(self._mending)

    async def _mend(self) -> _Connection:
        connection = self._connection
        if connection is not None and not connection.over:
            if await self._lives(connection):
                connection.doubted = False
                return connection
            self._drop(connection)
        self._connection = await self._open()
        return self._connection

    def _mended(self, task: asyncio.Task[_Connection]) -> None:
        self._mending = None
        if not task.cancelled():
            task.exception()  # those who asked may all have gone

    async def _open(self) -> _Connection:
        connection = _Connection(asyncio.get_running_loop().create_future())
        connection.owner = asyncio.create_task(self._own(connection), name=f"MCP server {self.place.name}")
        self.starts += 1
        try:
            await asyncio.shield(connection.session)
        except BaseException:
            self._drop(connection)
            raise
        return connection

    async def _own(self, connection: _Connection) -> None:
        """The whole of one connection's life.  Its failure to open is the session's exception."""
        with tempfile.TemporaryFile("w+", errors="replace") as said:
            try:
                async with AwakeTimeout(self.place.start_s) as limit, self._session(said) as session:
                    await session.initialize()
                    limit.lift()
                    if not connection.session.done():
                        connection.session.set_result(session)
                    await connection.leave.wait()
            except Exception as error:
                if connection.session.done():
                    return  # a server that has gone may make leaving fail
                reason = f"it did not start within {self.place.start_s:g} s"
                if not isinstance(error, TimeoutError):
                    reason = _inner(error)
                connection.session.set_exception(
                    ToolUnavailable(f"{self.place.name}: {reason}{_said(said)}", delivered=False)
                )
                connection.session.exception()  # whoever waited may have gone: then nobody else asks for it

    @contextlib.asynccontextmanager
    async def _session(self, said: TextIO) -> AsyncGenerator[ClientSession]:
        try:
            import httpx2
            from mcp.client.stdio import StdioServerParameters, get_default_environment, stdio_client
            from mcp.client.streamable_http import streamable_http_client
        except ImportError as error:
            raise McpMissing from error
        place = self.place
        async with contextlib.AsyncExitStack() as stack:
            if place.command:
                program, *arguments = place.command
                environment = get_default_environment() | place.environment()
                server = StdioServerParameters(
                    command=program, args=arguments, env=environment, cwd=place.cwd or None
                )
                streams = await stack.enter_async_context(stdio_client(server, errlog=said))
            else:
                http = await stack.enter_async_context(
                    httpx2.AsyncClient(headers=place.headers(), timeout=httpx2.Timeout(_HTTP_S, read=None))
                )
                streams = await stack.enter_async_context(streamable_http_client(place.url, http_client=http))
            yield await stack.enter_async_context(_session_class()(*streams[:2]))

    async def _lives(self, connection: _Connection) -> bool:
        try:
            async with AwakeTimeout(_PING_S):
                await connection.session.result().send_ping()
        except Exception:  # whatever a server that is going makes the SDK raise
            return False
        return True

    @contextlib.asynccontextmanager
    async def _its(self, what: str) -> AsyncGenerator[None]:
        """The server's own time for something that no call's deadline bounds."""
        try:
            async with AwakeTimeout(self.place.start_s):
                yield
        except TimeoutError:
            raise ToolUnavailable(f"{self.place.name}: no {what} within {self.place.start_s:g} s") from None
        except ToolUnavailable:
            raise
        except Exception as error:
            raise ToolUnavailable(f"{self.place.name}: no {what}: {_inner(error)}") from error

    def _drop(self, connection: _Connection) -> None:
        """Let its owner leave; a connection that cannot be left is cancelled."""
        if self._connection is connection:
            self._connection = None
        if connection.leave.is_set():
            return
        connection.leave.set()
        task = asyncio.create_task(_left(connection), name=f"leaving MCP server {self.place.name}")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)


@cache
def _session_class() -> type[ClientSession]:
    from mcp import ClientSession

    class UncheckedSession(ClientSession):
        """The SDK's, which would match what a server answers against the server's own regular expressions, on
        the event loop and for as long as they like.  An answer is text for the model, whatever its form.
        """

        async def validate_tool_result(self, name: str, result: CallToolResult) -> None:
            return None

    return UncheckedSession


async def _left(connection: _Connection) -> None:
    assert connection.owner is not None
    if not connection.session.done():  # it is still being opened: nothing reads `leave`
        connection.owner.cancel()
    await asyncio.wait([connection.owner], timeout=_LEAVE_S)
    connection.owner.cancel()
    await asyncio.gather(connection.owner, return_exceptions=True)


def _inner(error: BaseException) -> str:
    """The first cause in groups of exceptions."""
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    return named(error)


def _said(errors: TextIO) -> str:
    errors.seek(0)
    text = " ".join(errors.read()[-_SAID_CHARS:].split())
    return f" (it said: {text})" if text else ""
