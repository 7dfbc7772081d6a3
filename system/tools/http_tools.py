"""The tools that live behind HTTP servers: search and python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from system.http import HttpClient, HttpError
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec, ToolStatus
from system.tools.tool import ToolUnavailable

_CHECK_DEADLINE_S = 10.0


class _ServerTool:
    """A client of one server.  ``http`` is its maker's to close."""

    remedy: ClassVar[str]  # for a server that does not answer

    def __init__(self, url: str, *, http: HttpClient):
        self.url = url.rstrip("/")
        self._http = http

    async def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object that the server answers; :class:`ToolUnavailable` when it does not."""
        try:
            return await self._http.request("POST", self.url + path, body)
        except HttpError as error:
            raise ToolUnavailable(str(error), retryable=error.passing) from error

    async def _health(self) -> dict[str, Any]:
        try:
            return await self._http.request("GET", f"{self.url}/health", limit_s=_CHECK_DEADLINE_S)
        except HttpError as error:
            raise ToolUnavailable(f"{error}: {self.remedy}") from error

    def _unexpected(self, error: Exception) -> ToolUnavailable:
        return ToolUnavailable(f"unexpected answer from {self.url}: {error!r}", retryable=False)


class SearchTool(_ServerTool):
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
    remedy = "start `python -m system.tools.search_server --corpus FILE --port PORT` or set tools.search_url"

    def __init__(
        self,
        url: str,
        top_k: int = 3,
        *,
        passage: str = "{title}: {text}",
        separator: str = "\n",
        http: HttpClient,
    ):
        """``passage`` formats one result (fields id, title, text, score); ``separator`` joins results."""
        super().__init__(url, http=http)
        self._top_k, self._passage, self._separator = top_k, passage, separator

    async def run(self, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        query = str(arguments["query"]).strip()
        if not query:
            return ToolOutcome(ToolStatus.REJECTED, "The search query is empty.")
        body = {"query": query, "top_k": self._top_k}
        answer = await self._post("/search", body)
        try:
            passages = [self._format(result) for result in answer["results"]]
        except (KeyError, TypeError) as error:
            raise self._unexpected(error) from error
        return ToolOutcome(ToolStatus.OK, self._separator.join(passages) or "No results.")

    async def check(self) -> None:
        if not (await self._health()).get("documents", 1):
            raise ToolUnavailable(f"the server at {self.url} has no documents: {self.remedy}")

    def _format(self, result: Mapping[str, Any]) -> str:
        """One result; a title that is missing leaves no stray separator behind."""
        fields = {"id": "", "title": "", "score": 0.0} | dict(result)
        form = self._passage if fields["title"] else "{text}"
        return form.format(**fields)


class PythonTool(_ServerTool):
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
    remedy = "start `python -m system.tools.python_server --port PORT`"

    async def run(self, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        body: dict[str, Any] = {"code": arguments["code"]}
        if context.deadline_s is not None:
            body["deadline_s"] = context.deadline_s
        answer = await self._post("/run", body)
        try:
            return ToolOutcome(ToolStatus(answer["status"]), str(answer["text"]))
        except (KeyError, ValueError) as error:
            raise self._unexpected(error) from error

    async def check(self) -> None:
        await self._health()
        outcome = await self.run({"code": "6 * 7"}, CallContext(deadline_s=_CHECK_DEADLINE_S))
        if (outcome.status, outcome.text) != (ToolStatus.OK, "42"):
            raise ToolUnavailable(f"`6 * 7` at {self.url} gave {outcome.status.value}: {outcome.text!r}")
