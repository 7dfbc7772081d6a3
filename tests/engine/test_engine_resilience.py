"""Broken connections, dead servers, odd streams and bad requests: no token twice, none lost, no silent
success.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from engine_models import (
    EngineClient,
    Served,
    TinyModel,
    assert_exact,
    collect,
    joined,
    prompt,
    request,
    text_of,
)
from test_engine_replicas import server_process

from system.awake import AwakeTimeout
from system.config import EngineConfig
from system.engine.answers import HttpAnswers
from system.engine.embedded import EmbeddedEngine
from system.engine.protocol import EngineError
from system.engine.stream import CutGuard, EventSplitter
from system.serving import free_port
from system.serving import serve as serve_app

FINISH = {
    "text": "a",
    "output_ids": [5],
    "meta_info": {
        "completion_tokens": 1,
        "weight_version": "1",
        "finish_reason": {"type": "stop", "matched": 5},
        "output_token_logprobs": [[-1.0, 5, None]],
    },
}


@pytest.fixture(params=[False, True], ids=["http", "channel"])
def channel(request: pytest.FixtureRequest) -> bool:
    """How the client asks the embedded engine."""
    return request.param


@pytest.fixture
async def one(serve: Callable[..., Any]) -> Served:
    return await serve("qwen3", True)


@asynccontextmanager
async def cutting_proxy(target: str, after_bytes: int, cuts: int) -> AsyncIterator[str]:
    """A TCP proxy that tears its first ``cuts`` ``/generate`` answers off after so many bytes."""
    port = int(target.rsplit(":", 1)[1])
    left = [cuts]

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int | None) -> None:
        passed = 0
        while data := await reader.read(65536):
            if limit is not None and passed + len(data) > limit:
                writer.write(data[: limit - passed])
                await writer.drain()
                writer.transport.abort()
                return
            passed += len(data)
            writer.write(data)
            await writer.drain()
        writer.close()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.read(65536)
        upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", port)
        upstream.write(first)
        cut = b"/generate" in first.split(b"\r\n")[0] and left[0] > 0
        left[0] -= cut
        await asyncio.gather(
            pump(reader, upstream, None),
            pump(upstream_reader, writer, after_bytes if cut else None),
            return_exceptions=True,
        )
        upstream.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_standstill_of_ours_costs_an_attempt_and_not_the_request() -> None:
    async def generate(request: web.Request) -> web.Response:
        for _ in range(20):
            await asyncio.sleep(0.01)
        return web.Response(text=f"data: {json.dumps(FINISH)}\n\ndata: [DONE]\n\n")

    async def stand_still() -> None:
        await asyncio.sleep(0.1)
        time.sleep(4.0)  # noqa: ASYNC251 (what stands still)

    app = web.Application()
    app.router.add_post("/generate", generate)
    server = await serve_app(app)
    client = EngineClient([server.url], deadline_s=2.5)
    async with AwakeTimeout(60.0):  # a tree's
        chunks, _ = await asyncio.gather(collect(client, request("r", prompt(3))), stand_still())
    assert [chunk.tokens.tolist() for chunk in chunks] == [[5]]
    assert client.counters["retried"] >= 1
    await client.close()
    await server.close()


async def test_one_connection_serves_one_request_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a stream may come after its finish, in a packet of its own: it is read all the same."""
    monkeypatch.setattr("system.engine.answers._READ_OUT_S", 30.0)  # on a loaded machine a second may pass
    peers = set()

    async def generate(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        peers.add(request.transport.get_extra_info("peername"))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(f"data: {json.dumps(FINISH)}\n\n".encode())
        await asyncio.sleep(0.02)
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_post("/generate", generate)
    server = await serve_app(app)
    client = EngineClient([server.url])
    assert isinstance(client._answers, HttpAnswers)
    try:
        for number in range(4):
            (chunk,) = await collect(client, request(f"r{number}", prompt(3)))
            assert chunk.tokens.tolist() == [5]
            async with asyncio.timeout(60):
                while client._answers._endings:  # noqa: ASYNC110 (whose last one reads the stream to its end)
                    await asyncio.sleep(0.01)
        assert len(peers) == 1
    finally:
        await client.close()
        await server.close()


@pytest.mark.parametrize("after_bytes", [10, 700, 1500, 3001])
async def test_a_broken_stream_goes_on_without_a_gap_or_a_double(
    one: Served, after_bytes: int, channel: bool
) -> None:
    """With a seed the mended sequence is the very one an unbroken stream gives."""
    ids = prompt(12)
    whole = joined(await collect(one.client, request("whole", ids, 60, seed=3)))
    async with cutting_proxy(one.url, after_bytes, cuts=2) as url:
        client = EngineClient([url], channel=channel)
        out = joined(await collect(client, request("cut", ids, 60, seed=3)))
        await client.close()
    assert out.tokens.tolist() == whole.tokens.tolist()
    assert out.finish == whole.finish
    assert_exact(one.model, ids, out)


async def test_a_stop_string_across_the_cut_is_found(one: Served, channel: bool) -> None:
    """Greedy text, with the stop string laid over each token boundary at which the stream may have been
    cut.
    """
    decode, ids = text_of(), prompt(10, 4)
    free = joined(await collect(one.client, request("free", ids, 60, temperature=0.0))).tokens.tolist()
    texts = [decode([token]) for token in free]
    spots = [i for i in range(1, 30) if all(texts[j] and "�" not in texts[j] for j in (i, i + 1))]
    for number, i in enumerate(spots):
        stop = texts[i][-1:] + texts[i + 1][:1]
        expected = next(n for n in range(1, 61) if stop in decode(free[:n]))
        async with cutting_proxy(one.url, 1200 + 97 * number, cuts=1) as url:
            client = EngineClient([url], channel=channel)
            out = joined(await collect(client, request(f"s{number}", ids, 60, temperature=0.0, stop=(stop,))))
            await client.close()
        assert out.tokens.tolist() == free[:expected], (stop, number)
        assert out.finish is not None
        assert (out.finish.type, out.finish.matched) == ("stop", stop)


async def test_a_stop_string_across_two_requests_is_found(one: Served) -> None:
    """A resumed run sends what a segment has so far as prompt: only ``said`` tells of a stop begun there."""
    decode, ids = text_of(), prompt(10, 4)
    free = joined(await collect(one.client, request("free", ids, 60, temperature=0.0))).tokens.tolist()
    texts = [decode([token]) for token in free]
    for i in [i for i in range(1, 30) if all(texts[j] and "�" not in texts[j] for j in (i, i + 1))]:
        stop = texts[i][-1:] + texts[i + 1][:1]
        expected = next(
            (n for n in range(i + 2, 61) if stop in decode(free[:n])[len(decode(free[:i])) :]), 60
        )
        rest = request(f"r{i}", [*ids, *free[: i + 1]], 59 - i, temperature=0.0, stop=(stop,))
        out = joined(await collect(one.client, replace(rest, said=decode(free[: i + 1]))))
        assert out.tokens.tolist() == free[i + 1 : expected], (stop, i)


def test_cut_guard_sees_only_matches_across_the_cut() -> None:
    guard = CutGuard(("</search>",))
    assert guard.feed("so <search> x </sea") is None
    guard.cut()
    assert guard.feed("r") is None
    assert guard.feed("ch> and") == "</search>"
    guard = CutGuard(("</search>",))
    guard.feed("</sea")
    guard.cut()
    assert guard.feed("side </search>") is None, "a match after the cut is the server's to find"
    assert not guard.watching


async def test_connection_refused_is_an_error_in_time(channel: bool) -> None:
    client = EngineClient([f"http://127.0.0.1:{free_port()}"], deadline_s=20, retries=2, channel=channel)
    began = time.monotonic()
    with pytest.raises(EngineError, match="gave up after 3 failures"):
        await collect(client, request("a", prompt(5)))
    assert time.monotonic() - began < 10
    assert not await client.healthy()
    await client.close()


async def test_a_silent_server_is_given_up_at_the_deadline(channel: bool) -> None:
    async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silence, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        client = EngineClient([url], deadline_s=0.5, channel=channel)
        began = time.monotonic()
        with pytest.raises(EngineError, match=r"not done within 0\.5 s"):
            await collect(client, request("a", prompt(5)))
        assert time.monotonic() - began < 5
        await client.close()


async def test_a_killed_server_is_an_error_within_the_deadline(
    tiny: Callable[..., TinyModel], channel: bool
) -> None:
    async with server_process(tiny(), pass_s=0.005) as server:
        client = EngineClient([server.url], deadline_s=30, retries=2, channel=channel)
        await client.wait_ready(60)
        chunks = client.generate(request("a", prompt(5), 450))
        got = len((await anext(chunks)).tokens)
        server.kill()
        began = time.monotonic()
        with pytest.raises(EngineError):  # noqa: PT012 (any of the reads may be the one that fails)
            while True:
                got += len((await anext(chunks)).tokens)
        assert 0 < got < 450
        assert time.monotonic() - began < 30
        await client.close()


async def test_an_engine_that_fails_says_so(
    one: Served, monkeypatch: pytest.MonkeyPatch, channel: bool
) -> None:
    def broken(self: Any) -> None:
        raise MemoryError("no room for keys")

    one.pace.pass_s = 0.01
    client = EngineClient([one.url], retries=1, channel=channel)
    task = asyncio.create_task(collect(client, request("a", prompt(5), 200)))
    await asyncio.sleep(0.05)
    monkeypatch.setattr(type(one.engine._scheduler), "step", broken)
    with pytest.raises(EngineError, match="no room for keys"):
        await task
    assert not await client.healthy()
    with pytest.raises(EngineError, match="no room for keys"):
        await client.pause()
    await client.close()


@pytest.mark.parametrize("incremental", [False, True])
async def test_cumulative_and_incremental_streams_read_alike(incremental: bool) -> None:
    """SGLang's default repeats everything in each message; a server written by hand, 3 + 2 + 4 tokens."""
    tokens = list(range(10, 19))

    async def generate(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        start = 0
        for stop in (3, 5, 9):
            low = start if incremental else 0
            message = {
                "text": "",
                "output_ids": tokens[low:stop],
                "meta_info": {
                    "finish_reason": {"type": "length", "length": 9} if stop == 9 else None,
                    "completion_tokens": stop,
                    "cached_tokens": 2,
                    "weight_version": "1",
                    "weight_versions": [
                        {"version": "default", "start": 0, "end": min(stop, 4)},
                        *([{"version": "1", "start": 4, "end": stop}] if stop > 4 else []),
                    ],
                    "output_token_logprobs": [[-t / 10, t, None] for t in tokens[low:stop]],
                },
            }
            data = f"data: {json.dumps(message)}\n\n".encode()
            for i in range(0, len(data), 50):  # however the bytes are cut
                await response.write(data[i : i + 50])
            start = stop
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_post("/generate", generate)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    client = EngineClient([f"http://127.0.0.1:{runner.addresses[0][1]}"])
    chunks = await collect(client, request("a", prompt(5), 9))
    assert [len(chunk.tokens) for chunk in chunks] == [3, 2, 4]
    out = joined(chunks)
    assert out.tokens.tolist() == tokens
    np.testing.assert_allclose(out.logprob, -np.array(tokens) / 10, rtol=1e-6)
    assert out.version.tolist() == [0] * 4 + [1] * 5
    assert np.isnan(out.entropy).all()
    assert out.cached_tokens == 2
    await client.close()
    await runner.cleanup()


BAD = [
    ({"stream": False}, "stream"),
    ({"input_ids": []}, "input_ids"),
    ({"input_ids": [1, "x"]}, "input_ids"),
    ({"input_ids": [1, 10**6]}, "input_ids"),
    ({"input_ids": [[1, 2]]}, "input_ids"),
    ({"input_ids": None, "text": "hello"}, "input_ids"),
    ({"rid": 7}, "rid"),
    ({"sampling_params": []}, "sampling_params"),
    ({"sampling_params": {"max_new_tokens": 0}}, "max_new_tokens"),
    ({"sampling_params": {"max_new_tokens": 254}}, "max_new_tokens"),
    ({"sampling_params": {"temperature": -1}}, "temperature"),
    ({"sampling_params": {"temperature": "hot"}}, "temperature"),
    ({"sampling_params": {"top_p": 0}}, "top_p"),
    ({"sampling_params": {"top_k": 0}}, "top_k"),
    ({"sampling_params": {"stop": [""]}}, "stop"),
    ({"sampling_params": {"stop_token_ids": [-1]}}, "stop_token_ids"),
    ({"sampling_params": {"stop_token_ids": 5}}, "stop_token_ids"),
    ({"sampling_params": {"sampling_seed": 1.5}}, "sampling_seed"),
    ({"sampling_params": {"min_p": 0.1}}, "min_p"),
]


async def test_bad_requests_are_named(one: Served) -> None:
    good = {"rid": "r", "stream": True, "input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4}}
    async with aiohttp.ClientSession() as session:
        for change, field in BAD:
            async with session.post(f"{one.url}/generate", json={**good, **change}) as answer:
                assert answer.status == 400, change
                assert field in (await answer.json())["error"]["message"], change
        for path, body, field in (
            ("/generate", b"{nonsense", "body"),
            ("/generate", b"[1]", "body"),
            ("/pause_generation", b'{"mode":"hard"}', "mode"),
            ("/abort_request", b"{}", "rid"),
            ("/end_weight_update", b'{"weight_version":"x"}', "weight_version"),
            ("/update_weights_from_tensor", b"\x80\x04pickle", "octet-stream"),
        ):
            async with session.post(
                one.url + path, data=body, headers={"Content-Type": "application/json"}
            ) as answer:
                assert answer.status == 400, path
                assert field in await answer.text(), path
        headers = {"Content-Type": "application/octet-stream"}
        await session.post(f"{one.url}/begin_weight_update")
        async with session.post(
            f"{one.url}/update_weights_from_tensor", data=b"\x80\x04pickle", headers=headers
        ) as answer:
            assert answer.status == 400
            assert "safetensors" in await answer.text()
        async with session.post(f"{one.url}/generate", json=good) as answer:  # all of that broke nothing
            assert answer.status == 200
            (result,) = EventSplitter().feed(await answer.read())
    assert len(result["output_ids"]) == 4
    assert result["meta_info"]["weight_versions"] == [{"version": "0", "start": 0, "end": 4}]


async def test_a_duplicate_request_id_is_refused(one: Served) -> None:
    one.pace.pass_s = 0.01
    body = {
        "rid": "twice",
        "stream": True,
        "input_ids": [1, 2],
        "sampling_params": {"max_new_tokens": 200, "ignore_eos": True},
    }
    async with aiohttp.ClientSession() as session:
        first = asyncio.create_task(session.post(f"{one.url}/generate", json=body))
        async with asyncio.timeout(60):
            while not (await one.client.infos())[0].running:  # noqa: ASYNC110 (another process's state)
                await asyncio.sleep(0.002)
        async with session.post(f"{one.url}/generate", json=body) as second:
            assert second.status == 400
            assert "twice" in await second.text()
        one.pace.pass_s = 0.0
        answer = await first
        assert answer.status == 200, "the first one must not suffer"
        results = list(EventSplitter().feed(await answer.read()))
        assert sum(len(result["output_ids"]) for result in results) == 200


async def test_an_update_without_begin_is_refused(one: Served) -> None:
    with pytest.raises(EngineError, match="begin_weight_update"):
        await one.client.post("/end_weight_update", weight_version="1")


async def test_listening_everywhere_must_be_said(tiny: Callable[..., TinyModel]) -> None:
    engine = EmbeddedEngine(EngineConfig(device="cpu", max_running=2, cache_slots=0), tiny().path)
    with pytest.raises(ValueError, match="every interface"):
        await engine.start("")
    url = await engine.start()
    assert url.startswith("http://127.0.0.1:")
    await engine.stop()
