"""The tools that live behind HTTP servers: search and python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from system.errors import ConfigError
from system.http import HttpClient, HttpError
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec, ToolStatus
from system.tools.tool import CallRefused, ToolUnavailable

_CHECK_DEADLINE_S = 10.0
_REFUSALS = (400, 413, 414, 422)  # what a server answers to a request that it cannot take: not its own fault
_MAX_REASON = 200  # characters of a server's reason that the model reads


PROTOCOLS = ("espalier", "search-r1")


class _ServerTool:
    """A client of one server.  ``http`` is its maker's to close."""

    remedy: ClassVar[str]  # for a server that does not answer

    def __init__(self, url: str, *, http: HttpClient):
        self.url = url.rstrip("/")
        self._http = http

    async def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object that the server answers; :class:`ToolUnavailable` when it does not, and
        :class:`CallRefused` when it does not take this ``body``."""
        try:
            return await self._http.request("POST", self.url + path, body)
        except HttpError as error:
            if error.status in _REFUSALS:
                raise CallRefused(error.said[:_MAX_REASON] or f"HTTP {error.status}") from error
            delivered = not error.refused and error.status != 429
            raise ToolUnavailable(str(error), retryable=error.passing, delivered=delivered) from error

    async def _health(self) -> dict[str, Any]:
        try:
            return await self._http.request("GET", f"{self.url}/health", limit_s=_CHECK_DEADLINE_S)
        except HttpError as error:
            raise ToolUnavailable(f"{error}: {self.remedy}") from error

    def _unexpected(self, error: Exception) -> ToolUnavailable:
        return ToolUnavailable(f"unexpected answer from {self.url}: {error!r}", retryable=False)


class SearchTool(_ServerTool):
    """A retrieval server: :mod:`.search_server`, or any that speaks one of its two protocols."""

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
        protocol: str = "espalier",
        passage: str = "{title}: {text}",
        separator: str = "\n",
        http: HttpClient,
    ):
        """``protocol``: ``espalier`` (POST /search) or ``search-r1`` (POST /retrieve, as Search-R1's and
        its descendants' servers have it); ``passage`` formats one result (fields id, title, text, score);
        ``separator`` joins results.  Raises ConfigError for another protocol."""
        if protocol not in PROTOCOLS:
            raise ConfigError(
                f"tools.options.search.protocol={protocol!r}: choose one of {', '.join(PROTOCOLS)}"
            )
        super().__init__(url.rstrip("/").removesuffix("/retrieve"), http=http)
        self._find = self._retrieve if protocol == "search-r1" else self._search
        self._protocol = protocol
        self._top_k, self._passage, self._separator = top_k, passage, separator

    async def run(self, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        query = str(arguments["query"]).strip()
        if not query:
            return ToolOutcome(ToolStatus.REJECTED, "The search query is empty.")
        try:
            passages = [self._format(result) for result in await self._find(query)]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise self._unexpected(error) from error
        return ToolOutcome(ToolStatus.OK, self._separator.join(passages) or "No results.")

    async def _search(self, query: str) -> list[Mapping[str, Any]]:
        return (await self._post("/search", {"query": query, "top_k": self._top_k}))["results"]

    async def _retrieve(self, query: str) -> list[Mapping[str, Any]]:
        body = {"queries": [query], "topk": self._top_k, "return_scores": True}
        answer = await self._post("/retrieve", body)
        return [_retrieved(result) for result in answer["result"][0]]

    async def check(self) -> None:
        if self._protocol == "search-r1":  # such a server has no other way to say that it works
            try:
                await self._retrieve("test")
            except ToolUnavailable as error:
                raise ToolUnavailable(f"{error}: {self.remedy}") from error
            return
        if not (await self._health()).get("documents", 1):
            raise ToolUnavailable(f"the server at {self.url} has no documents: {self.remedy}")

    def _format(self, result: Mapping[str, Any]) -> str:
        """One result; a title that is missing leaves no stray separator behind."""
        fields = {"id": "", "title": "", "score": 0.0} | dict(result)
        form = self._passage if fields["title"] else "{text}"
        return form.format(**fields)


def _retrieved(result: Mapping[str, Any]) -> dict[str, Any]:
    """One result of /retrieve.  A document is its ``contents``, the title in quotation marks as first line,
    or has title and text of their own; a server that gives no scores sends the bare document."""
    document = result.get("document", result)
    if "contents" not in document:
        return {"score": result.get("score", 0.0)} | dict(document)
    first, newline, rest = str(document["contents"]).partition("\n")
    title, text = (first.strip().strip('"'), rest) if newline else ("", first)
    return {"id": document.get("id", ""), "title": title, "text": text, "score": result.get("score", 0.0)}


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
        idempotent=True,
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
