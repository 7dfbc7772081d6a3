"""The tools behind HTTP servers: what a server can do to a call, and what a start finds wrong with one."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from system.config import ToolsConfig
from system.errors import ConfigError
from system.http import HttpClient
from system.serving import AppServer, serve
from system.tools.http_tools import SearchTool
from system.tools.outcome import CallContext, ToolStatus
from system.tools.service import Patience, ToolService, ToolStartError, build_tools

FAST = Patience(backoff_s=0.02)
ANY = CallContext()


class Http:
    """A server that answers /search as it is told to: "ok", a status, "drop", "slow", "garbage" or "list"."""

    def __init__(self) -> None:
        self.script: list[Any] = []
        self.requests = 0
        app = web.Application()
        app.router.add_post("/search", self._search)
        app.router.add_get("/health", self._health)
        self.app = app
        self.url = ""

    async def _search(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        step = self.script.pop(0) if self.script else "ok"
        if isinstance(step, int):
            return web.Response(status=step, text="no")
        if step == "drop":
            assert request.transport is not None
            request.transport.close()
        if step == "slow":
            await asyncio.sleep(60)
        if step == "garbage":
            return web.Response(text="<html>")
        if step == "list":
            return web.json_response([])
        return web.json_response({"results": [{"id": "1", "title": "T", "text": "x", "score": 1.0}]})

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"ok": True, "documents": 0})


@pytest_asyncio.fixture
async def http() -> AsyncIterator[Http]:
    scripted = Http()
    server = await serve(scripted.app)
    scripted.url = server.url
    yield scripted
    await server.close()


@pytest_asyncio.fixture
async def over_http(http: Http) -> AsyncIterator[ToolService]:
    client = HttpClient()
    tools = ToolService([SearchTool(http.url, http=client)], ToolsConfig(), patience=FAST, http=client)
    yield tools
    await tools.close()


@pytest.mark.parametrize(
    ("script", "status", "requests"),
    [
        (["ok"], ToolStatus.OK, 1),
        ([500, 503, "ok"], ToolStatus.OK, 3),
        (["drop", "ok"], ToolStatus.OK, 2),
        ([429, "ok"], ToolStatus.OK, 2),
        ([500, 500, 500], ToolStatus.UNAVAILABLE, 3),
        ([404], ToolStatus.UNAVAILABLE, 1),
        ([400], ToolStatus.REJECTED, 1),
        ([422], ToolStatus.REJECTED, 1),
        (["garbage"], ToolStatus.UNAVAILABLE, 1),
        (["list"], ToolStatus.UNAVAILABLE, 1),
        (["slow"], ToolStatus.TIMEOUT, 1),
    ],
)
async def test_what_a_server_does(
    http: Http, over_http: ToolService, script: list, status: ToolStatus, requests: int
) -> None:
    http.script = list(script)
    # Long enough for a request to arrive on a machine that stands still for a moment.
    deadline_s = 3.0 if "slow" in script else None
    outcome = await over_http.call("search", {"query": "x"}, CallContext(deadline_s=deadline_s))
    assert (outcome.status, http.requests) == (status, requests)
    if status is ToolStatus.OK:
        assert outcome.text == "T: x"


async def test_a_server_that_takes_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a firewall that drops what is sent: here the queue of a socket is full."""
    monkeypatch.setattr("system.http.CONNECT_S", 0.3)
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as deaf,
        socket.create_connection(deaf.getsockname()),
    ):
        client = HttpClient()
        search = SearchTool(f"http://127.0.0.1:{deaf.getsockname()[1]}", http=client)
        tools = ToolService([search], ToolsConfig(), patience=FAST, http=client)
        outcome = await tools.call("search", {"query": "x"}, ANY)
        assert (outcome.status, outcome.attempts) == (ToolStatus.UNAVAILABLE, 3)
        assert outcome.detail.startswith(f"no connection within 0.3 s at {search.url}")
        with pytest.raises(ToolStartError, match=r"no connection within 0\.3 s at .*set tools\.search_url"):
            await tools.check()
        await tools.close()


async def test_five_refused_queries_leave_the_tool_to_others(http: Http, over_http: ToolService) -> None:
    http.script = [400] * 5
    for i in range(5):
        outcome = await over_http.call("search", {"query": f"bad {i}"}, ANY)
        assert outcome.text == "The tool 'search' refused the call: no"
    assert (await over_http.call("search", {"query": "good"}, ANY)).status is ToolStatus.OK


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (
            {"document": {"contents": '"Paris"\nThe capital.\nOn the Seine.'}, "score": 0.5},
            "Paris: The capital.\nOn the Seine.",
        ),
        ({"document": {"id": 3, "contents": "No title here."}, "score": 0.5}, "No title here."),
        ({"document": {"title": "Rome", "text": "Italy."}, "score": 0.5}, "Rome: Italy."),
        ({"contents": '"Paris"\nThe capital.'}, "Paris: The capital."),  # a server that gives no scores
    ],
)
async def test_a_server_that_speaks_the_protocol_of_search_r1(result: dict[str, Any], text: str) -> None:
    bodies: list[Any] = []

    async def retrieve(request: web.Request) -> web.Response:
        bodies.append(await request.json())
        return web.json_response({"result": [[result, result]]})

    app = web.Application()
    app.router.add_post("/retrieve", retrieve)
    server = await serve(app)
    config = ToolsConfig(
        names=["search"],
        options={"search": {"protocol": "search-r1", "separator": " | "}},
        search_url=f"{server.url}/retrieve",  # as its users write it
    )
    tools = build_tools(config, {})
    try:
        await tools.check()
        outcome = await tools.call("search", {"query": "x"}, ANY)
    finally:
        await tools.close()
        await server.close()
    assert outcome.text == f"{text} | {text}"
    assert bodies[-1] == {"queries": ["x"], "topk": 3, "return_scores": True}


async def test_another_protocol_is_refused_by_name() -> None:
    config = ToolsConfig(names=["search"], options={"search": {"protocol": "solr"}}, search_url="http://x")
    with pytest.raises(ConfigError, match=r"tools\.options\.search\.protocol='solr': choose one of espalier"):
        build_tools(config, {})


async def test_a_server_that_is_restarted_is_met_again() -> None:
    first = await serve(Http().app)
    port = int(first.url.rsplit(":", 1)[1])
    limits, patience = ToolsConfig(deadline_s=10, retries=6), Patience(backoff_s=0.05)
    client = HttpClient()
    tools = ToolService([SearchTool(first.url, http=client)], limits, patience=patience, http=client)
    second: AppServer | None = None
    try:
        assert (await tools.call("search", {"query": "a"}, ANY)).status is ToolStatus.OK
        await first.close()
        waiting = asyncio.ensure_future(tools.call("search", {"query": "b"}, ANY))
        await asyncio.sleep(0.15)
        second = await serve(Http().app, port=port)
        outcome = await waiting
        assert outcome.status is ToolStatus.OK
        assert outcome.attempts > 1
    finally:
        await tools.close()
        if second is not None:
            await second.close()


async def test_an_empty_query_reaches_no_server(http: Http, over_http: ToolService) -> None:
    outcome = await over_http.call("search", {"query": "  "}, ANY)
    assert (outcome.status, http.requests) == (ToolStatus.REJECTED, 0)


async def test_a_tool_that_cannot_work_is_named_with_reason_and_remedy() -> None:
    tools = build_tools(ToolsConfig(), {"search": "http://127.0.0.1:9", "python": "http://127.0.0.1:9"})
    try:
        with pytest.raises(ToolStartError) as caught:
            await tools.check()
    finally:
        await tools.close()
    message = str(caught.value)
    assert "tool 'search': connection refused at http://127.0.0.1:9/health" in message
    assert "set tools.search_url" in message
    assert "tool 'python': connection refused" in message


async def test_a_search_server_without_documents_cannot_work(http: Http) -> None:
    tools = build_tools(ToolsConfig(names=["search"]), {"search": http.url})
    try:
        with pytest.raises(ToolStartError, match=r"the server at .* has no documents"):
            await tools.check()
    finally:
        await tools.close()
