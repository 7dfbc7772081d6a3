"""The tools that live behind HTTP servers: search and python."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp

from system.tools.outcome import CallContext, ToolOutcome, ToolSpec, ToolStatus
from system.tools.tool import ToolUnavailable

_CHECK_DEADLINE_S = 10.0
_MAX_ANSWER_BYTES = 8 << 20
_RETRYABLE_CLIENT_ERRORS = (408, 425, 429)


class HttpClient:
    """One aiohttp session for all HTTP tools of a process: connections are kept and shared."""

    def __init__(self, connections: int = 256):
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None

    async def request(self, method: str, url: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object a server answers.

        Raises ToolUnavailable: retryable when the connection failed or the status is one that passes (5xx,
        408, 425, 429), otherwise not.  The caller sets the deadline.
        """
        session = self._open()
        try:
            async with session.request(method, url, json=body) as response:
                data = await _body(response)
        except aiohttp.InvalidURL as error:
            raise ToolUnavailable(f"not a URL: {url!r}", retryable=False) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise ToolUnavailable(f"{_reason(error)} at {url}") from error
        if response.status != 200:
            raise ToolUnavailable(
                f"HTTP {response.status} at {url}: {data[:300].decode(errors='replace').strip()}",
                retryable=response.status >= 500 or response.status in _RETRYABLE_CLIENT_ERRORS,
            )
        try:
            answer = json.loads(data)
        except ValueError as error:
            raise ToolUnavailable(f"no JSON from {url}: {error}", retryable=False) from error
        if not isinstance(answer, dict):
            raise ToolUnavailable(f"no JSON object from {url}", retryable=False)
        return answer

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        """The session, made at the first request: it belongs to the loop that is running then."""
        if self._session is None or self._session.closed:
            connector = aiohttp.TCPConnector(limit=self._connections)
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=aiohttp.ClientTimeout(total=None)
            )
        return self._session


class SearchTool:
    """A retrieval server (:mod:`.search_server`, or any that speaks its protocol)."""

    spec = ToolSpec(
        name="search",
        description="Search a collection of documents and get the passages that match best.",
        parameters={
            "type": "object",
            "properties": {"query": {"type": "string", "description": "what to look for"}},
            "required": ["query"],
        },
        primary="query",
        pure=True,
    )

    def __init__(
        self,
        url: str,
        top_k: int = 3,
        *,
        passage: str = "{title}: {text}",
        separator: str = "\n",
        http: HttpClient | None = None,
    ):
        """``passage`` formats one result (fields id, title, text, score); ``separator`` joins results."""
        self.url = url.rstrip("/")
        self._top_k, self._passage, self._separator = top_k, passage, separator
        self._http = http or HttpClient()

    async def run(self, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        query = str(arguments["query"]).strip()
        if not query:
            return ToolOutcome(ToolStatus.REJECTED, "The search query is empty.")
        body = {"query": query, "top_k": self._top_k}
        answer = await self._http.request("POST", f"{self.url}/search", body)
        try:
            passages = [self._format(result) for result in answer["results"]]
        except (KeyError, TypeError) as error:
            raise ToolUnavailable(f"unexpected answer from {self.url}: {error!r}", retryable=False) from error
        return ToolOutcome(ToolStatus.OK, self._separator.join(passages) or "No results.")

    async def check(self) -> None:
        remedy = (
            "start `python -m system.tools.search_server --corpus FILE --port PORT` or set tools.search_url"
        )
        health = await _health(self._http, self.url, remedy)
        if not health.get("documents", 1):
            raise ToolUnavailable(f"the server at {self.url} has no documents: {remedy}")

    async def close(self) -> None:
        await self._http.close()

    def _format(self, result: Mapping[str, Any]) -> str:
        """One result; a title that is missing leaves no stray separator behind."""
        fields = {"id": "", "title": "", "score": 0.0} | dict(result)
        form = self._passage if fields["title"] else "{text}"
        return form.format(**fields)


class PythonTool:
    """A sandboxed interpreter behind :mod:`.python_server`.  Running a program twice changes nothing outside
    the sandbox, so a call whose connection broke may be retried; its result is not cached (it may use time or
    chance)."""

    spec = ToolSpec(
        name="python",
        description="Run a Python program and get what it prints and the value of its last expression.",
        parameters={
            "type": "object",
            "properties": {"code": {"type": "string", "description": "the program"}},
            "required": ["code"],
        },
        primary="code",
    )

    def __init__(self, url: str, *, http: HttpClient | None = None):
        self.url = url.rstrip("/")
        self._http = http or HttpClient()

    async def run(self, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        body: dict[str, Any] = {"code": arguments["code"]}
        if context.deadline_s is not None:
            body["deadline_s"] = context.deadline_s
        answer = await self._http.request("POST", f"{self.url}/run", body)
        try:
            return ToolOutcome(ToolStatus(answer["status"]), str(answer["text"]))
        except (KeyError, ValueError) as error:
            raise ToolUnavailable(f"unexpected answer from {self.url}: {error!r}", retryable=False) from error

    async def check(self) -> None:
        remedy = "start `python -m system.tools.python_server --port PORT`"
        await _health(self._http, self.url, remedy)
        outcome = await self.run({"code": "6 * 7"}, CallContext(deadline_s=_CHECK_DEADLINE_S))
        if (outcome.status, outcome.text) != (ToolStatus.OK, "42"):
            raise ToolUnavailable(f"`6 * 7` at {self.url} gave {outcome.status.value}: {outcome.text!r}")

    async def close(self) -> None:
        await self._http.close()


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """The whole body, unless a server sends more than any answer needs."""
    data = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        data += chunk
        if len(data) > _MAX_ANSWER_BYTES:
            raise ToolUnavailable(f"more than {_MAX_ANSWER_BYTES} bytes from {response.url}", retryable=False)
    return bytes(data)


async def _health(http: HttpClient, url: str, remedy: str) -> dict[str, Any]:
    try:
        async with asyncio.timeout(_CHECK_DEADLINE_S):
            return await http.request("GET", f"{url}/health")
    except TimeoutError:
        raise ToolUnavailable(f"no answer from {url} within {_CHECK_DEADLINE_S:g} s: {remedy}") from None
    except ToolUnavailable as error:
        raise ToolUnavailable(f"{error}: {remedy}") from error


def _reason(error: Exception) -> str:
    """The short name of a connection failure."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError):
        return "connection lost"
    return f"{type(error).__name__}: {error}"
