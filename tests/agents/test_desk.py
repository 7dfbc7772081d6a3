"""Agents that somebody else starts: they ask for a session, work in it, and end it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from aiohttp import ClientSession, web
from openai import AsyncOpenAI
from test_group_rollout import END, Bench

from actors import keys
from system.agents.desk import SessionDesk
from system.agents.messages import Refusal
from system.config import ConfigError, load
from system.config.agent import listening
from system.rollout.failure import RolloutFailed
from system.serving import free_port
from system.tree.record import Outcome
from system.tree.stats import TreeStats

TOKEN = "a token of ours"
SHOWN = {"Authorization": f"Bearer {TOKEN}"}


class Desk(Bench):
    """A runner that listens, and a client for the services that come."""

    def __init__(self, *lines: str, idle_s: float = 60.0, wait_s: float = 60.0, **agent: Any) -> None:
        address = f"127.0.0.1:{free_port()}"
        super().__init__(SessionDesk(TOKEN, idle_s, wait_s), *lines, agent={"listen": address, **agent})
        self.http = httpx.AsyncClient(base_url=f"http://{address}", timeout=60)

    async def ask(self, **headers: str) -> httpx.Response:
        return await self.http.post("/sessions", json={}, headers=headers or SHOWN)

    async def told(self) -> dict[str, Any]:
        """What a service is told that comes for an episode."""
        reply = await self.ask()
        assert reply.status_code == 201, reply.text
        return reply.json()

    async def post(self, told: dict[str, Any], what: str, **body: Any) -> int:
        return (await self.http.post(f"{told['anthropic_base_url']}/{what}", json=body)).status_code


@asynccontextmanager
async def desk(*lines: str, **settings: Any) -> AsyncIterator[Desk]:
    """It listens from the run's start on, as the worker's check has it."""
    there = Desk(*lines, **settings)
    await there.runner.check()
    try:
        async with there.http:
            yield there
    finally:
        await there.runner.close()


async def turn(told: dict[str, Any]) -> str:
    messages: list[Any] = told["task"]["messages"]
    url, key = told["openai_base_url"], told["api_key"]
    async with AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as openai:
        reply = await openai.chat.completions.create(messages=messages, model=told["model"])
    return reply.choices[0].message.content or ""


async def test_a_service_comes_for_an_episode_plays_it_and_ends_it() -> None:
    async with desk(f"It is 42.{END}", f"It is 41.{END}") as there:
        growing = asyncio.create_task(there.tree())
        first = await there.told()
        assert first["task"]["question"] == "How much is it?"
        assert "42" not in str(first["task"])  # a gold answer is never told
        assert await turn(first) == "It is 42."
        assert await there.post(first, "done") == 200
        second = await there.told()
        assert second["api_key"] != first["api_key"]
        assert second["task"]["seed"] != first["task"]["seed"]
        assert await turn(second) == "It is 41."
        assert await there.post(second, "reward", reward=0.25, correct=True) == 200
        assert await there.post(second, "done") == 200
        tree = await growing
        assert await there.post(first, "done") == 409
    stats = TreeStats.of(tree)
    assert stats.rewards.tolist() == [1.0, 0.25]  # the run's own reward; the one that was reported
    assert stats.correct.tolist() == [1, 1]
    assert tree.outcome.tolist() == [Outcome.ENDED] * 2
    assert there.runner.counters["agent/episodes"] == 2


async def test_whoever_shows_no_token_gets_nothing_and_whoever_comes_too_soon_comes_again() -> None:
    async with desk(wait_s=0.05) as there:
        for shown in ({"Authorization": "Bearer another"}, {"Authorization": TOKEN}, {"X-None": ""}):
            assert (await there.ask(**shown)).status_code == 401
        assert (await there.ask()).status_code == 503


async def test_an_agent_that_is_silent_is_gone_and_its_episode_has_no_score() -> None:
    async with desk(idle_s=0.2) as there:
        growing = asyncio.create_task(there.tree(greedy=True))
        told = await there.told()
        with pytest.raises(RolloutFailed, match=r"was not heard of for 0\.2 s"):
            await growing
        assert await there.post(told, "done") == 409
    assert there.runner.counters["agent/failed"] == 1


async def test_an_agent_is_not_silent_while_the_process_stands_still() -> None:
    async with desk(f"It is 42.{END}", idle_s=3.0, deadline_s=3.5) as there:
        growing = asyncio.create_task(there.tree(greedy=True))
        told = await there.told()
        assert await turn(told) == "It is 42."
        await asyncio.sleep(0.05)
        time.sleep(4.0)  # noqa: ASYNC251 (what stands still)
        await asyncio.sleep(0.1)
        assert await there.post(told, "reward", reward=1.0) == 200
        assert await there.post(told, "done") == 200
        assert (await growing).outcome.tolist() == [Outcome.ENDED]


async def test_an_agent_may_say_that_it_failed() -> None:
    async with desk() as there:
        growing = asyncio.create_task(there.tree(greedy=True))
        told = await there.told()
        assert await there.post(told, "done", failed=["no", "text"]) == 400
        assert await there.post(told, "done", failed="its browser\nis gone") == 200
        with pytest.raises(RolloutFailed, match="says that it failed: its browser is gone"):
            await growing


async def test_the_time_of_an_episode_begins_when_its_agent_has_come() -> None:
    async with desk() as there:
        opening = asyncio.create_task(there.runner.open("q1", 0, 1.0))
        coming = asyncio.create_task(there.ask())
        session = await opening
        assert not coming.done()  # it is told once it has its task
        running = asyncio.create_task(there.runner.run(session, {"id": "q1"}))
        assert (await coming).json()["task"] == {"id": "q1", "seed": 0}
        session.finish()
        assert not (await running).result
        session.close(Outcome.ENDED)


async def test_one_that_has_gone_is_passed_over() -> None:
    books = SessionDesk(TOKEN, 60.0)
    gone = asyncio.create_task(books.ask(SHOWN["Authorization"]))
    await asyncio.sleep(0)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    waiting = asyncio.create_task(books.come())
    await asyncio.sleep(0)
    assert not waiting.done()
    asks = asyncio.create_task(books.ask(SHOWN["Authorization"]))
    assert not (await waiting).done()
    asks.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asks
    with pytest.raises(Refusal):
        await books.ask("Bearer another")


class Gateway(httpx.AsyncHTTPTransport):
    """Stands for the name service and the end of TLS: whatever a URL's host is, this port is asked."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.url = request.url.copy_with(scheme="http", host="127.0.0.1", port=self._port)
        return await super().handle_async_request(request)


@asynccontextmanager
async def proxied(upstream: httpx.URL, prefix: str) -> AsyncIterator[httpx.AsyncClient]:
    """A reverse proxy that serves what is below ``prefix``, and takes that off; and a client of it.  The host
    that a client asks for is handed on, as many proxies do.
    """

    async def forward(request: web.Request) -> web.StreamResponse:
        assert request.path.startswith(prefix), request.path
        url = upstream.copy_with(path=request.path.removeprefix(prefix))
        async with ClientSession() as http:
            asked = http.request(request.method, str(url), headers=request.headers, data=await request.read())
            async with asked as answer:
                headers = {"Content-Type": answer.headers["Content-Type"]}
                response = web.StreamResponse(status=answer.status, headers=headers)
                await response.prepare(request)
                async for piece in answer.content.iter_any():
                    await response.write(piece)
                return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", forward)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with httpx.AsyncClient(transport=Gateway(runner.addresses[0][1]), timeout=60) as http:
            yield http
    finally:
        await runner.cleanup()


async def test_behind_a_proxy_it_answers_to_its_public_name_and_tells_urls_of_it() -> None:
    public = "https://agents.example.org/espalier"
    async with (
        desk(f"It is 42.{END}", public_url=f"{public}/") as there,
        proxied(there.http.base_url, "/espalier") as http,
    ):
        growing = asyncio.create_task(there.tree(greedy=True))
        told = (await http.post(f"{public}/sessions", json={}, headers=SHOWN)).raise_for_status().json()
        assert told["anthropic_base_url"] == f"{public}/s/{told['api_key']}"
        assert told["openai_base_url"] == f"{public}/s/{told['api_key']}/v1"
        openai = AsyncOpenAI(
            base_url=told["openai_base_url"], api_key=told["api_key"], max_retries=0, http_client=http
        )
        messages: list[Any] = told["task"]["messages"]
        stream = await openai.chat.completions.create(messages=messages, model=told["model"], stream=True)
        said = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        assert "".join(said) == "It is 42."
        assert (await http.post(f"{told['anthropic_base_url']}/done", json={})).status_code == 200
        await growing


async def test_a_foreign_name_is_refused_with_the_setting_that_makes_it_known() -> None:
    async with desk() as there:
        reply = await there.ask(Host="agents.example.org:443", **SHOWN)
    assert reply.status_code == 421
    assert reply.json()["error"]["code"] == "unknown_host"
    assert "set agent.public_url" in reply.json()["error"]["message"]


async def test_a_proxy_that_hands_on_a_name_of_its_own_is_told_what_to_hand_on() -> None:
    async with desk(public_url="https://agents.example.org/espalier") as there:
        reply = await there.ask(Host="upstream", **SHOWN)
    assert reply.status_code == 421
    said = reply.json()["error"]["message"]
    assert "set agent.public_url" not in said
    assert "agents.example.org (agent.public_url)" in said
    assert "must hand on the client's Host" in said


async def test_a_place_that_is_taken_is_named_at_the_start() -> None:
    async with desk() as there:
        other = Bench(SessionDesk(TOKEN, 60.0), agent={"listen": there.http.base_url.netloc.decode()})
        with pytest.raises(ConfigError, match=r"agent.listen=127\.0\.0\.1:\d+: it cannot be listened there"):
            await other.runner.check()


FITS = ("agent.listen=127.0.0.1:8200", "agent.token_env=DESK", "branching=none", "tools.names=[]")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["agent.command=./agent"], r"agent.command='./agent' and agent.listen=127.0.0.1:8200: which agent"),
        (["agent.token_env="], "agent.listen needs agent.token_env"),
        (["agent.token_env=a-token"], "agent.listen needs agent.token_env"),
        (["agent.listen=", "agent.command=./agent"], "agent.token_env is for agents that ask for sessions"),
        (
            ["agent.listen=", "agent.token_env=", "agent.public_url=http://a", "agent.command=./agent"],
            "agent.public_url is for agents that ask for sessions",
        ),
        (["agent.public_url=agents.example.org"], "agent.public_url: 'agents.example.org' is no http"),
        (["agent.public_url=https://me:secret@example.org"], "agent.public_url: .* is no http"),
        (["agent.public_url=https://example.org:99999"], "agent.public_url: Port out of range"),
        (["agent.public_url=https://example.org/?a=b"], "agent.public_url: .* is no http"),
        (["agent.public_url='https://example.org/?'"], r"agent.public_url: .* it has '\?' in it"),
        (["agent.public_url='https://example.org/#'"], "agent.public_url: .* it has '#' in it"),
        (["agent.public_url='https://example.org/a b'"], "agent.public_url: .* it has ' ' in it"),
        (["agent.listen=8200"], "'8200' is no HOST:PORT"),
        (["agent.listen=here:99999"], "'here:99999' is no HOST:PORT"),
        (["agent.forks=replay", "branching=arpo-calibrated"], "agent.forks=replay starts agents"),
        (["rollout.workers=2"], "set rollout.workers=1"),
        (
            ["agent.env={MODE: fast}"],
            "agent.env is the environment of a command, and agent.listen=.* is none",
        ),
        (["branching=arpo"], "agent.listen=127.0.0.1:8200: what such an agent remembers"),
    ],
)
def test_what_listening_does_not_go_with(words: list[str], says: str) -> None:
    assert load(None, [*FITS]).agent.on
    with pytest.raises(ConfigError, match=says):
        load(None, [*FITS, *words])


def test_an_address_may_be_one_of_ipv6() -> None:
    assert listening("[::1]:8200") == ("::1", 8200)
    assert listening("node-7.cluster:80") == ("node-7.cluster", 80)


def test_the_token_comes_from_the_environment(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESK", TOKEN)
    with keys.made(load(None, [*FITS]), tmp_path):
        assert keys.held().sessions == TOKEN
        assert TOKEN not in repr(keys.held())
