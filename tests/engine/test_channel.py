"""The channel that carries all of a client's requests to an embedded engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from engine_models import EngineClient, Growing, Served, TinyModel, collect, joined, prompt, request

from system.config import EngineConfig
from system.engine.answers import CHANNEL, MAX_REQUEST_BYTES, Broken, ChannelAnswers
from system.engine.control import Http
from system.engine.embedded import EmbeddedEngine, channel
from system.engine.protocol import EngineError
from system.serving import serve

BODY = {"rid": "r", "stream": True, "input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4}}


def sampling(count: int) -> dict[str, Any]:
    return {"max_new_tokens": count, "ignore_eos": True}


@pytest.fixture
async def one(serve: Callable[..., Any]) -> Served:
    served = await serve("qwen3", True)
    await served.client.close()
    served.client = EngineClient([served.url], deadline_s=60, stall_s=30, channel=True)
    return served


@pytest.fixture
async def socket(one: Served) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    async with aiohttp.ClientSession() as http, http.ws_connect(one.url + CHANNEL) as socket:
        yield socket


async def idle(one: Served) -> None:
    async with asyncio.timeout(60):
        while one.engine.load_report()["num_running_reqs"]:  # noqa: ASYNC110 (a thread's state)
            await asyncio.sleep(0.02)


async def told(socket: aiohttp.ClientWebSocketResponse) -> list[list[Any]]:
    return orjson.loads(await socket.receive_bytes(timeout=60))


async def test_all_requests_share_one_connection(one: Served) -> None:
    """And are answered each with its own tokens, those of a call of its own."""
    asked = [request(f"r{i}", prompt(5 + i, i), 20, seed=i) for i in range(20)]
    http = EngineClient([one.url], deadline_s=60)
    alone = [joined(await collect(http, one)).tokens.tolist() for one in asked]
    await http.close()
    outs = await asyncio.gather(*(collect(one.client, one_of) for one_of in asked))
    assert [joined(chunks).tokens.tolist() for chunks in outs] == alone
    answers = one.client._answers
    assert isinstance(answers, ChannelAnswers)
    assert len(answers._links) == 1
    assert not (await answers._links[one.url]).news, "nobody waits any more"


async def test_a_client_that_goes_away_takes_its_requests_with_it(one: Served) -> None:
    one.pace.pass_s = 0.02
    chunks = [one.client.generate(request(f"r{i}", prompt(5), 200)) for i in range(3)]
    for each in chunks:
        await anext(each)
    answers = one.client._answers
    await answers.close()
    await idle(one)
    assert one.engine.load_report()["generated_tokens"] < 3 * 200
    for each in chunks:
        await each.aclose()


async def test_one_request_given_up_leaves_the_others(one: Served) -> None:
    one.pace.pass_s = 0.005
    given_up = one.client.generate(request("a", prompt(5), 200))
    other = asyncio.create_task(collect(one.client, request("b", prompt(6), 100)))
    await anext(given_up)
    await given_up.aclose()
    assert joined(await other).tokens.size == 100
    await idle(one)
    assert one.engine.load_report()["generated_tokens"] < 300


async def test_a_silent_channel_is_left_for_another(one: Served) -> None:
    """Of a server that hangs, or a machine that is gone without a word."""
    client = EngineClient([one.url], deadline_s=60, stall_s=0.3, retries=0, channel=True)
    await collect(client, request("before", prompt(5), 4))
    answers = client._answers
    assert isinstance(answers, ChannelAnswers)
    first = await answers._links[one.url]
    await client.pause("in_place")
    with pytest.raises(EngineError, match="gave up after 1 failures"):
        await collect(client, request("silent", prompt(5), 4))
    await client.resume()
    assert joined(await collect(client, request("after", prompt(5), 4))).tokens.size == 4
    assert await answers._links[one.url] is not first
    async with asyncio.timeout(10):
        while not first.closed:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await client.close()


async def test_what_is_no_request_is_refused_and_the_channel_stays(
    one: Served, socket: aiohttp.ClientWebSocketResponse
) -> None:
    for frame, rid, field in (
        (b"{nonsense", "", ""),
        (b"[1]", "", "a JSON object"),
        (orjson.dumps(BODY | {"input_ids": []}), "r", "input_ids"),
        (orjson.dumps(BODY | {"rid": ""}), "", "rid"),
    ):
        await socket.send_bytes(frame)
        ((who, message),) = await told(socket)
        assert who == rid
        assert message["error"]["code"] == 400
        assert field in message["error"]["message"]
    one.pace.pass_s = 0.05
    await socket.send_bytes(orjson.dumps(BODY))
    await socket.send_bytes(orjson.dumps(BODY))
    messages = [message for _, message in await told(socket)]
    while not any("meta_info" in message and message["meta_info"]["finish_reason"] for message in messages):
        messages += [message for _, message in await told(socket)]
    refused = [message["error"]["message"] for message in messages if "error" in message]
    assert refused == ["rid: 'r' is already being generated"]
    assert sum(len(message.get("output_ids", ())) for message in messages) == 4, "the first one goes on"


async def test_no_page_may_open_it_and_a_key_is_asked_for(tiny: Callable[..., TinyModel]) -> None:
    """A browser lets any page open a WebSocket to this machine."""
    engine = EmbeddedEngine(EngineConfig(device="cpu", max_context=64), tiny().path, seed=0)
    url = await engine.start(key="secret")
    key = {"Authorization": "Bearer secret"}
    try:
        async with aiohttp.ClientSession() as http:
            for headers, status in (({}, 401), (key | {"Origin": "https://a.example"}, 403)):
                with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                    await http.ws_connect(url + CHANNEL, headers=headers)
                assert refused.value.status == status
        stranger = EngineClient([url], deadline_s=20, retries=0, channel=True)
        with pytest.raises(EngineError, match="refused"):
            await collect(stranger, request("a", prompt(5), 4))
        await stranger.close()
    finally:
        await engine.stop()


async def test_a_server_ends_at_once_though_a_channel_is_open(tiny: Callable[..., TinyModel]) -> None:
    engine = EmbeddedEngine(EngineConfig(device="cpu", max_context=64), tiny().path, seed=0)
    client = EngineClient([await engine.start()], deadline_s=20, retries=0, channel=True)
    await collect(client, request("a", prompt(5), 4))
    began = time.monotonic()
    await engine.stop()
    assert time.monotonic() - began < 1.5, "it waits two seconds for handlers that do not end"
    await client.close()


async def test_a_request_that_is_too_long_is_refused_and_the_channel_stays(
    one: Served, socket: aiohttp.ClientWebSocketResponse, monkeypatch: pytest.MonkeyPatch
) -> None:
    await socket.send_bytes(b'"' + b"x" * (MAX_REQUEST_BYTES - 2) + b'"')
    assert (await told(socket))[0][1]["error"]["message"] == "expected a JSON object", "the longest is read"
    monkeypatch.setattr("system.engine.answers.MAX_REQUEST_BYTES", 1000)
    one.pace.pass_s = 0.005
    other = Growing(one.client, request("other", prompt(5), 100))
    await other.begun()
    with pytest.raises(EngineError, match=r"request .* has \d+ bytes, of at most 1000"):
        await collect(one.client, request("long", prompt(250), 4))
    assert (await other.whole()).tokens.size == 100
    assert one.client.counters.get("resumed", 0) == one.client.counters.get("retried", 0) == 0


async def test_an_abort_ends_that_request(one: Served, socket: aiohttp.ClientWebSocketResponse) -> None:
    one.pace.pass_s = 0.02
    for frame in ({"abort": ["r"]}, {"abort": "r"}, BODY | {"sampling_params": {}}, {"abort": "r"}):
        await socket.send_bytes(orjson.dumps(frame))
    ((rid, message),) = await told(socket)
    assert (rid, message["meta_info"]["finish_reason"]["type"]) == ("r", "abort")
    await socket.send_bytes(orjson.dumps(BODY))
    messages = await told(socket)
    while not messages[-1][1]["meta_info"]["finish_reason"]:
        messages += await told(socket)
    assert sum(len(message["output_ids"]) for _, message in messages) == 4, "the id is free again"


async def test_a_client_that_goes_away_leaves_others_their_requests_of_the_same_id(
    one: Served, socket: aiohttp.ClientWebSocketResponse
) -> None:
    one.pace.pass_s = 0.2
    asked = orjson.dumps(BODY | {"sampling_params": sampling(12)})
    await socket.send_bytes(asked)
    messages = await told(socket)
    async with aiohttp.ClientSession() as http, http.ws_connect(one.url + CHANNEL) as another:
        await another.send_bytes(asked)
    while not (finish := messages[-1][1]["meta_info"]["finish_reason"]):
        messages += await told(socket)
    assert finish["type"] == "length"


async def test_an_answer_that_cannot_be_written_fails_its_request_alone(
    one: Served, socket: aiohttp.ClientWebSocketResponse, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(engine: Any, job: Any, event: Any) -> dict[str, Any]:
        if job.rid == "bad":
            raise ZeroDivisionError("none")
        return written(engine, job, event)

    written = channel.answer
    monkeypatch.setattr(channel, "answer", answer)
    one.pace.pass_s = 0.005
    for rid, count in (("bad", 200), ("good", 50)):
        await socket.send_bytes(orjson.dumps(BODY | {"rid": rid, "sampling_params": sampling(count)}))
    messages = await told(socket)
    while messages[-1][0] == "bad" or not messages[-1][1]["meta_info"]["finish_reason"]:
        messages += await told(socket)
    error = {"message": "ZeroDivisionError: none", "code": 500}
    assert [message for rid, message in messages if rid == "bad"] == [{"error": error}]
    assert sum(len(message["output_ids"]) for rid, message in messages if rid == "good") == 50
    await idle(one)
    assert one.engine.load_report()["generated_tokens"] < 200


async def test_a_channel_that_cannot_be_written_to_is_closed(
    socket: aiohttp.ClientWebSocketResponse, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails(*_: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(web.WebSocketResponse, "send_bytes", fails)
    with caplog.at_level(logging.ERROR):
        await socket.send_bytes(orjson.dumps(BODY))
        closed = await socket.receive(timeout=10)
    assert (closed.type, closed.data) == (aiohttp.WSMsgType.CLOSE, aiohttp.WSCloseCode.INTERNAL_ERROR)
    assert "cannot be written to" in caplog.text


def test_no_list_of_messages_is_longer_than_a_client_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_FRAME_BYTES", 1000)
    news = [(str(i), {"text": "x" * (2000 if i == 7 else 90)}) for i in range(20)]
    frames = [*channel._frames(news)]
    assert [one for frame in frames for one in orjson.loads(frame)] == [[rid, text] for rid, text in news]
    assert [len(frame) > 1000 for frame in frames].count(True) == 1, "that which is longer by itself"
    assert len(frames) < 8


async def test_an_abort_comes_after_its_request_and_on_the_same_way() -> None:
    came: asyncio.Queue[Any] = asyncio.Queue()

    async def serve_channel(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for frame in socket:
            came.put_nowait(orjson.loads(frame.data))
        return socket

    async def abort(request: web.Request) -> web.Response:
        came.put_nowait("a call")
        return web.json_response({})

    app = web.Application()
    app.add_routes([web.get(CHANNEL, serve_channel), web.post("/abort_request", abort)])
    server = await serve(app)
    client = EngineClient([server.url], deadline_s=20, channel=True)
    try:
        asking = asyncio.create_task(collect(client, request("a", prompt(5), 4)))
        async with asyncio.timeout(20):
            asked = await came.get()
            asking.cancel()
            assert await came.get() == {"abort": asked["rid"]}
        await client.close()
        assert came.empty()
    finally:
        await client.close()
        await server.close()


async def test_who_waits_for_a_channel_is_told_when_it_is_closed() -> None:
    opening, ended = asyncio.Event(), asyncio.Event()

    async def hangs(request: web.Request) -> web.Response:
        opening.set()
        await ended.wait()
        return web.Response()

    app = web.Application()
    app.router.add_get(CHANNEL, hangs)
    server = await serve(app)
    async with Http() as http:
        answers = ChannelAnswers(http, 20.0)
        first = asyncio.ensure_future(anext(answers.ask(server.url, "a", b"{}", 20.0)))
        await asyncio.wait_for(opening.wait(), 20)
        await answers.close()
        with pytest.raises(Broken, match="closed"):
            await first
    ended.set()
    await server.close()


@pytest.mark.parametrize("frame", ["{", "[1]", '[["r", 5]]', '[[["r"], {}]]'])
async def test_a_server_that_sends_nonsense_is_given_up(frame: str) -> None:
    async def channel(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        await socket.send_str(frame)
        await socket.receive()
        return socket

    app = web.Application()
    app.router.add_get(CHANNEL, channel)
    server = await serve(app)
    client = EngineClient([server.url], deadline_s=20, stall_s=10, retries=0, channel=True)
    try:
        with pytest.raises(EngineError, match="the channel was closed"):
            await collect(client, request("a", prompt(5), 4))
    finally:
        await client.close()
        await server.close()
