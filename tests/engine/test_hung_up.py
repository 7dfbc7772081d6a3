"""A client that hangs up in the middle of its answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

BODY = {
    "rid": "r",
    "input_ids": [5, 6, 7],
    "sampling_params": {"max_new_tokens": 200, "ignore_eos": True},
    "stream": True,
}


@pytest.mark.parametrize("found", ["by the loop", "by a write"])
async def test_it_ends_its_request_without_a_word(
    serve: Callable[..., Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    """Whoever is first to find it: the event loop, which then cancels the handler, or a write."""
    it = await serve(pass_s=0.05)
    (url,) = it.client.urls
    written: list[bytes] = []
    write = web.StreamResponse.write

    async def fails(self: web.StreamResponse, data: bytes) -> None:
        if written and found == "by a write":
            raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")
        written.append(data)
        await write(self, data)

    monkeypatch.setattr(web.StreamResponse, "write", fails)
    with caplog.at_level(logging.INFO):
        async with aiohttp.ClientSession() as http:
            answer = await http.post(f"{url}/generate", json=BODY)
            assert answer.status == 200, await answer.text()
            await answer.content.readany()
            if found == "by a write":
                with contextlib.suppress(aiohttp.ClientError):
                    await answer.content.read()
            answer.close()
        async with asyncio.timeout(60):
            while it.engine.load_report()["num_running_reqs"]:  # noqa: ASYNC110 (a thread's state)
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.2)
    assert it.engine.load_report()["generated_tokens"] < 200
    assert [one.getMessage() for one in caplog.records if one.exc_info] == []
