"""Servers that somebody else started: attached to only if they serve as the system needs them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
import pytest
from aiohttp import web

from actors.engine import attached, named
from actors.ray_support import StartFailed

META: dict[str, Any] = {
    "completion_tokens": 1,
    "output_token_logprobs": [[-1.0, 3, None]],
    "weight_version": "default",
    "finish_reason": {"type": "length", "length": 1},
}


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Any]]:
    """``await serve(meta, **arguments)``: a server whose every answer is one token with these facts about it;
    ``arguments``: what it was started with.
    """
    runners: list[web.AppRunner] = []

    async def start(meta: dict[str, Any], **arguments: Any) -> str:
        async def health(request: web.Request) -> web.Response:
            return web.Response()

        async def server_info(request: web.Request) -> web.Response:
            return web.json_response(arguments)

        async def generate(request: web.Request) -> web.Response:
            message = orjson.dumps({"output_ids": [3], "text": "", "meta_info": meta})
            body = b"data: " + message + b"\n\ndata: [DONE]\n\n"
            return web.Response(body=body, content_type="text/event-stream")

        app = web.Application()
        app.router.add_get("/health", health)
        app.router.add_get("/server_info", server_info)
        app.router.add_post("/generate", generate)
        runners.append(web.AppRunner(app))
        await runners[-1].setup()
        await web.TCPSite(runners[-1], "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runners[-1].addresses[0][1]}"

    yield start
    for runner in runners:
        await runner.cleanup()


async def test_a_server_with_entropies_is_attached_to(serve: Callable[..., Any]) -> None:
    await attached([await serve({**META, "entropy": [0.7]})], 5, entropies=True)


async def test_one_without_our_plug_in_is_refused_with_the_remedy(serve: Callable[..., Any]) -> None:
    good, bare = await serve({**META, "entropy": [0.7]}), await serve(META)
    with pytest.raises(StartFailed, match=f"{bare}: no entropies(?s:.*)PYTHONPATH(?s:.*)entropy_top_k"):
        await attached([good, bare], 5, entropies=True)
    await attached([good, bare], 5, entropies=False)  # estimates were asked for


async def test_one_that_records_no_experts_is_refused_where_they_are_wanted(
    serve: Callable[..., Any],
) -> None:
    meta = {**META, "entropy": [0.7]}
    bare = await serve(meta, enable_return_routed_experts=False)
    await attached([bare], 5, entropies=True)  # a model without experts
    await attached([await serve(meta, enable_return_routed_experts=True)], 5, entropies=True, routes=True)
    with pytest.raises(
        StartFailed,
        match=f"{bare}: rollout.replay_routes(?s:.*)--enable-return-routed-experts(?s:.*)replay_routes=false",
    ):
        await attached([bare], 5, entropies=True, routes=True)


async def test_one_that_does_not_answer_is_refused_by_the_deadline() -> None:
    with pytest.raises(StartFailed, match=r"not ready within 0\.5 s"):
        await attached(["http://127.0.0.1:9"], 0.5, entropies=True)


def test_an_address_may_end_in_a_slash() -> None:
    """`//server_info`, which an update asks first, is an unknown path to SGLang."""
    assert named(["http://a:1/", "http://b:2"]) == {"engine-0": "http://a:1", "engine-1": "http://b:2"}
