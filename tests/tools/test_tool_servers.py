"""The python and search servers over real HTTP, embedded and as programs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from polling import eventually
from sandboxes import children

from system.config import ToolsConfig
from system.http import HttpClient
from system.serving import AppServer, free_port, serve
from system.tools import python_server, search_server
from system.tools.http_tools import PROTOCOLS, SearchTool
from system.tools.outcome import CallContext, ToolStatus
from system.tools.sandbox.sandbox import Sandbox, SandboxLimits
from system.tools.search_index import Document, SearchIndex
from system.tools.service import ToolService, build_tools

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    Document("1", "Paris", "Paris is the capital of France."),
    Document("2", "", "Rome is the capital of Italy."),
]


@pytest_asyncio.fixture
async def search() -> AsyncIterator[AppServer]:
    server = await serve(search_server.create_app(SearchIndex.build(DOCUMENTS)))
    yield server
    await server.close()


@pytest_asyncio.fixture
async def python() -> AsyncIterator[AppServer]:
    server = await serve(python_server.create_app(Sandbox(SandboxLimits(wall_s=600))))
    yield server
    await server.close()


async def post(url: str, body: Any = None, **options: Any) -> tuple[int, str]:
    options = options or {"json": body}
    async with aiohttp.ClientSession() as session, session.post(url, **options) as response:
        return response.status, await response.text()


async def get(url: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        assert response.status == 200
        return await response.json()


async def test_search(search: AppServer) -> None:
    status, text = await post(f"{search.url}/search", {"query": "capital of France", "top_k": 1})
    (result,) = json.loads(text)["results"]
    assert status == 200
    assert {k: result[k] for k in ("id", "title", "text")} == {
        "id": "1",
        "title": "Paris",
        "text": "Paris is the capital of France.",
    }
    assert result["score"] > 0
    assert (await get(f"{search.url}/health"))["documents"] == 2


async def test_retrieve_as_search_r1_asks(search: AppServer) -> None:
    body = {"queries": ["France", "Italy", "nothing"], "topk": 2, "return_scores": True}
    status, text = await post(f"{search.url}/retrieve", body)
    (first,), (second,), none = json.loads(text)["result"]
    assert (status, none) == (200, [])
    assert first["document"]["contents"] == '"Paris"\nParis is the capital of France.'
    assert first["score"] > 0
    assert second["document"]["id"] == "2"
    _, text = await post(f"{search.url}/retrieve", {"queries": ["France"]})
    assert json.loads(text)["result"] == [[first["document"]]]


async def test_our_client_and_server_agree_in_both_protocols(search: AppServer) -> None:
    async with HttpClient() as http:
        texts = [
            (
                await SearchTool(search.url, http=http, protocol=p).run({"query": "capital"}, CallContext())
            ).text
            for p in PROTOCOLS
        ]
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"queries": "x"},
        {"queries": [1]},
        {"queries": ["x"], "topk": 0},
        {"queries": [], "return_scores": 1},
    ],
)
async def test_retrieve_refuses_malformed_requests(search: AppServer, body: dict) -> None:
    assert (await post(f"{search.url}/retrieve", body))[0] == 400


async def test_python(python: AppServer) -> None:
    status, text = await post(f"{python.url}/run", {"code": "print(1)\n2"})
    reply = json.loads(text)
    assert (status, reply["status"], reply["text"], reply["exit_code"]) == (200, "ok", "1\n2", 0)
    status, text = await post(f"{python.url}/run", {"code": "while True: pass", "deadline_s": 0.2})
    assert json.loads(text)["status"] == "timeout"
    health = await get(f"{python.url}/health")
    assert health["ok"]
    assert "seccomp" in health["confined_by"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"json": {"code": 3}}, 400),
        ({"json": {}}, 400),
        ({"json": []}, 400),
        ({"json": {"code": "1", "deadline_s": "soon"}}, 400),
        ({"data": b"{", "headers": {"Content-Type": "application/json"}}, 400),
        ({"data": json.dumps({"code": "1"}), "headers": {"Content-Type": "text/plain"}}, 415),
        ({"json": {"code": "#" * (3 << 20)}}, 413),
    ],
)
async def test_python_refuses_malformed_requests(python: AppServer, options: dict, expected: int) -> None:
    assert (await post(f"{python.url}/run", **options))[0] == expected


@pytest.mark.parametrize(
    "body", [{}, {"query": 1}, {"query": "x", "top_k": 0}, {"query": "x", "top_k": True}]
)
async def test_search_refuses_malformed_requests(search: AppServer, body: dict) -> None:
    assert (await post(f"{search.url}/search", body))[0] == 400


async def test_a_client_that_goes_away_ends_its_program(python: AppServer) -> None:
    pid = (await get(f"{python.url}/health"))["pid"]
    programs = lambda: [program for warden in children(pid) for program in children(warden)]  # noqa: E731
    call = asyncio.ensure_future(post(f"{python.url}/run", {"code": "import time\ntime.sleep(600)"}))
    await eventually(programs, 20, "its program never ran")
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await eventually(lambda: not programs(), 20, "its program still runs")


async def test_the_built_tools_end_to_end(search: AppServer, python: AppServer) -> None:
    config = ToolsConfig(search_top_k=2)
    tools = build_tools(config, {"search": search.url, "python": python.url})
    try:
        await tools.check()
        found = await tools.call("search", {"query": "capital"}, CallContext())
        lines = set(found.text.split("\n"))
        assert lines == {"Paris: Paris is the capital of France.", "Rome is the capital of Italy."}
        computed = await tools.call("python", {"code": "2 ** 10"}, CallContext())
        assert (computed.status, computed.text) == (ToolStatus.OK, "1024")
        failed = await tools.call("python", {"code": "1 / 0"}, CallContext())
        assert failed.status is ToolStatus.ERROR
        assert failed.text.endswith("ZeroDivisionError: division by zero")
        slow = await tools.call("python", {"code": "import time\ntime.sleep(9)"}, CallContext(deadline_s=0.3))
        assert slow.status is ToolStatus.TIMEOUT
    finally:
        await tools.close()


async def test_search_results_as_bare_text(search: AppServer) -> None:
    client = HttpClient()
    tool = SearchTool(search.url, 2, passage="{text}", separator=" ", http=client)
    tools = ToolService([tool], ToolsConfig(), http=client)
    try:
        found = await tools.call("search", {"query": "capital of France"}, CallContext())
    finally:
        await tools.close()
    assert found.text == "Paris is the capital of France. Rome is the capital of Italy."


@pytest.mark.parametrize("tool", ["search", "python"])
async def test_as_a_program(tool: str, tmp_path: Path) -> None:
    arguments = ["--port", str(port := free_port())]
    if tool == "search":
        lines = [json.dumps(asdict(document)) + "\n" for document in DOCUMENTS]
        (tmp_path / "corpus.jsonl").write_text("".join(lines))
        arguments += ["--corpus", str(tmp_path / "corpus.jsonl"), "--index", str(tmp_path / "index")]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"system.tools.{tool}_server", *arguments),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            assert await process.stdout.readline() == f"serving on http://127.0.0.1:{port}\n".encode()
            assert (await get(f"http://127.0.0.1:{port}/health"))["tool"] == tool
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()


async def test_a_program_that_cannot_start_says_why(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "system.tools.search_server",
            "--port",
            "1",
            "--corpus",
            str(tmp_path / "no"),
        ),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )
    _, stderr = await process.communicate()
    assert process.returncode == 1
    assert stderr.decode().startswith("search_server: no such corpus")
