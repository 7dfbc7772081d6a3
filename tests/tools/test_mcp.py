"""MCP servers that others wrote, over stdio and over HTTP, as tools: listed, called, killed, frozen."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from polling import eventually

from system.config import ToolsConfig
from system.config.mcp import place
from system.errors import ConfigError
from system.plugins import PluginError
from system.rollout.syntax.tags import TagSyntax
from system.tools.mcp.tools import outcome
from system.tools.outcome import CallContext, ToolStatus
from system.tools.service import Patience, ToolService, ToolStartError, build_tools

CLOCK = {"command": [sys.executable, "-m", "mcp_server_time"]}
PARIS = {"timezone": "Europe/Paris"}
FAST = Patience(backoff_s=0.01)
Below = Callable[[], dict[int, list[str]]]
Servers = Callable[[], list[psutil.Process]]


@pytest.fixture
async def serve(below: Below) -> AsyncIterator[Callable[..., ToolService]]:
    """``serve({entry of tools.mcp}, …, setting=…)``: a service that ends with the test, and its servers."""
    services: list[ToolService] = []

    def make(*servers: dict[str, Any], **settings: Any) -> ToolService:
        services.append(build_tools(ToolsConfig(names=[], mcp=list(servers), **settings), {}))
        return services[-1]

    before = below()
    yield make
    for service in services:
        await service.close()
    assert not below().keys() - before.keys(), "no server may outlive its service"


@pytest.fixture
def servers(below: Below) -> Callable[[], list[psutil.Process]]:
    return lambda: [psutil.Process(pid) for pid, words in below().items() if "mcp_server_time" in words]


async def call(tools: ToolService, name: str, arguments: dict[str, Any]) -> tuple[ToolStatus, str]:
    found = await tools.call(name, arguments, CallContext())
    return found.status, found.text


async def works(tools: ToolService, name: str, arguments: dict[str, Any]) -> str:
    """What it answers as soon as it does."""
    async with asyncio.timeout(60):
        while (found := await call(tools, name, arguments))[0] is not ToolStatus.OK:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return found[1]


async def test_a_servers_tools_are_listed_described_and_called(serve: Callable[..., ToolService]) -> None:
    tools = serve(
        {**CLOCK, "prefix": "clock_", "include": ["get_current_time"], "pure": ["get_current_time"]}
    )
    await tools.check()
    spec = tools.specs["clock_get_current_time"]
    assert list(tools.specs) == ["clock_get_current_time"]
    assert (spec.primary, spec.pure, spec.description) == (
        "timezone",
        True,
        "Get current time in a specific timezone",
    )
    status, text = await call(tools, spec.name, PARIS)
    assert status is ToolStatus.OK
    assert '"timezone": "Europe/Paris"' in text
    assert (await call(tools, spec.name, PARIS))[1] == text, "pure: from the cache, not the clock"
    assert tools.counters[f"tools/{spec.name}/cache_hits"] == 1
    status, text = await call(tools, spec.name, {"timezone": "Mars"})
    assert status is ToolStatus.ERROR
    assert "Mars" in text
    assert (await call(tools, spec.name, {}))[0] is ToolStatus.REJECTED


async def test_many_calls_at_once_share_one_server(
    serve: Callable[..., ToolService], servers: Servers
) -> None:
    tools = serve({**CLOCK, "names": {"get_current_time": "now"}})
    found = await asyncio.gather(*(call(tools, "now", PARIS) for _ in range(50)))
    assert {status for status, _ in found} == {ToolStatus.OK}
    assert len(servers()) == 1


async def test_a_server_that_dies_is_started_again(
    serve: Callable[..., ToolService], servers: Servers
) -> None:
    tools = serve({**CLOCK, "names": {"get_current_time": "now"}, "idempotent": ["get_current_time"]})
    assert (await call(tools, "now", PARIS))[0] is ToolStatus.OK
    (first,) = servers()
    first.kill()
    first.wait(10)
    assert (await call(tools, "now", PARIS))[0] is ToolStatus.OK, "it may be asked twice, and was"
    assert tools.counters["tools/now/retries"] == 1
    assert [one.pid for one in servers()] != [first.pid]


async def test_a_call_that_may_have_had_its_effect_is_not_sent_again(
    serve: Callable[..., ToolService], servers: Servers
) -> None:
    tools = serve({**CLOCK, "names": {"get_current_time": "now"}})
    await tools.check()
    (server,) = servers()
    server.suspend()
    waiting = asyncio.create_task(call(tools, "now", PARIS))
    await asyncio.sleep(0.2)
    server.kill()
    status, text = await waiting
    assert status is ToolStatus.UNAVAILABLE
    assert "It may have taken effect; it was not sent again." in text
    assert (await call(tools, "now", PARIS))[0] is ToolStatus.OK


async def test_a_server_that_hangs_is_replaced(serve: Callable[..., ToolService], servers: Servers) -> None:
    tools = serve({**CLOCK, "names": {"get_current_time": "now"}}, deadline_s=2.0)
    await works(tools, "now", PARIS)
    (server,) = servers()
    server.suspend()
    assert (await call(tools, "now", PARIS))[0] is ToolStatus.TIMEOUT
    await works(tools, "now", PARIS)
    await eventually(lambda: not server.is_running(), 20, "the one that hangs must be killed")


async def test_what_cannot_work_is_said_at_the_start(
    serve: Callable[..., ToolService], tmp_path: Path
) -> None:
    with pytest.raises(ToolStartError, match=r"tools\.mcp\[0\]: no-such-program --flag: .*No such file"):
        serve({"command": "no-such-program --flag"})
    with pytest.raises(ToolStartError, match=r"it said: bad luck"):
        serve({"command": [sys.executable, "-c", "import sys; sys.exit('bad luck')"]})
    with pytest.raises(ToolStartError, match=r"did not start within 0\.5 s"):
        serve({"command": [sys.executable, "-c", "import time; time.sleep(60)"], "start_s": 0.5})
    with pytest.raises(
        ToolStartError, match=r"tools\.mcp\[0\]\.include: .* has no tool 'get_curent_time'; did"
    ):
        serve({**CLOCK, "include": ["get_curent_time"]})
    with pytest.raises(
        ToolStartError, match=r"tools\.limits\.nwo: no such tool; there are now, convert_time"
    ):
        serve({**CLOCK, "names": {"get_current_time": "now"}}, limits={"nwo": {"retries": 1}})
    with pytest.raises(ToolStartError, match=r"env_from: the environment variable NO_SUCH_KEY is not set"):
        serve({**CLOCK, "env_from": ["NO_SUCH_KEY"]})
    with pytest.raises(ToolStartError, match="configured twice"):
        serve(CLOCK, CLOCK)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"comand": "x"}, r"tools\.mcp\[2\]\.comand: no such key; did you mean command\?"),
        ({}, r"tools\.mcp\[2\]: name the command that starts the server, or the url"),
        ({"command": "x", "url": "http://h"}, r"tools\.mcp\[2\]: name the command .*, or the url"),
        ({"url": "ftp://h"}, r"tools\.mcp\[2\]\.url='ftp://h': it begins with http"),
        ({"command": "x", "start_s": 0}, r"tools\.mcp\[2\]\.start_s=0: seconds"),
        ({"command": "x", "args": "y"}, r"tools\.mcp\[2\]\.args='y': a list of texts"),
        ({"command": "x", "env": ["y"]}, r"tools\.mcp\[2\]\.env=\['y'\]: names and texts"),
    ],
)
def test_an_entry_says_what_is_wrong_with_it(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place("tools.mcp[2]", given)


def test_a_servers_secrets_do_not_show() -> None:
    assert "hush" not in repr(place("tools.mcp[0]", {"command": "x", "env": {"TOKEN": "hush"}}))


async def test_a_tool_that_a_tag_cannot_hold_is_refused(serve: Callable[..., ToolService]) -> None:
    tools = serve({**CLOCK, "include": ["convert_time"]})
    with pytest.raises(
        PluginError, match=r"'convert_time' needs more than one argument .* rollout\.syntax=hermes"
    ):
        TagSyntax(tools.specs)


def test_contents_that_are_no_text_are_told() -> None:
    from mcp.types import CallToolResult, ImageContent, TextContent

    image = ImageContent(type="image", data="", mime_type="image/png")
    found = outcome(CallToolResult(content=[TextContent(type="text", text="a cat:"), image]))
    assert found.text == "a cat:\n[an image, which cannot be shown here]"
    found = outcome(CallToolResult(content=[], structured_content={"b": 1, "a": "ö"}))
    assert (found.status, found.text) == (ToolStatus.OK, '{"a": "ö", "b": 1}')


@pytest.mark.slow
async def test_a_server_over_http_dies_and_comes_back(
    serve: Callable[..., ToolService], mcp_http: Any
) -> None:
    mcp_http.start()
    await eventually(mcp_http.listens, 60, "the server does not start")
    tools = serve({"url": mcp_http.url, "include": ["echo", "get-sum"]}, retries=0)
    await tools.check()
    assert await call(tools, "echo", {"message": "hello"}) == (ToolStatus.OK, "Echo: hello")
    assert (await call(tools, "get-sum", {"a": 2, "b": 3}))[1] == "The sum of 2 and 3 is 5."
    mcp_http.kill()
    assert (await call(tools, "echo", {"message": "nobody"}))[0] is ToolStatus.UNAVAILABLE
    mcp_http.start()
    assert await works(tools, "echo", {"message": "again"}) == "Echo: again"
