"""The tools that live behind HTTP servers: search and python."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from system.http import HttpClient, HttpError
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec, ToolStatus
from system.tools.tool import ToolUnavailable

_CHECK_DEADLINE_S = 10.0


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
        answer = await _request(self._http, "POST", f"{self.url}/search", body)
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
        answer = await _request(self._http, "POST", f"{self.url}/run", body)
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


async def _request(http: HttpClient, method: str, url: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
    """The JSON object that a server answers; :class:`ToolUnavailable` when it does not."""
    try:
        return await http.request(method, url, body)
    except HttpError as error:
        raise ToolUnavailable(str(error), retryable=error.passing) from error


async def _health(http: HttpClient, url: str, remedy: str) -> dict[str, Any]:
    try:
        async with asyncio.timeout(_CHECK_DEADLINE_S):
            return await _request(http, "GET", f"{url}/health", None)
    except TimeoutError:
        raise ToolUnavailable(f"no answer from {url} within {_CHECK_DEADLINE_S:g} s: {remedy}") from None
    except ToolUnavailable as error:
        raise ToolUnavailable(f"{error}: {remedy}") from error
