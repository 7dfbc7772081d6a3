"""A client that hangs up in the middle of its answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import aiohttp
import pytest
from engine_models import TinyModel

from system.config import EngineConfig
from system.engine.embedded import EmbeddedEngine


async def test_it_ends_its_request_without_a_word(
    tiny: Callable[..., TinyModel], caplog: pytest.LogCaptureFixture
) -> None:
    engine = EmbeddedEngine(EngineConfig(device="cpu", max_running=2, cache_slots=0), tiny().path)
    url = await engine.start()
    body = {
        "input_ids": [5, 6, 7],
        "sampling_params": {"max_new_tokens": 200, "ignore_eos": True},
        "stream": True,
    }
    try:
        with caplog.at_level(logging.INFO):
            for number in range(5):
                async with aiohttp.ClientSession() as http:
                    answer = await http.post(f"{url}/generate", json={**body, "rid": str(number)})
                    assert answer.status == 200, await answer.text()
                    await answer.content.readany()
                    answer.close()
            async with asyncio.timeout(60):
                while engine.load_report()["num_running_reqs"]:  # noqa: ASYNC110 (a thread's state)
                    await asyncio.sleep(0.05)
            await asyncio.sleep(0.2)
    finally:
        await engine.stop()
    assert [one.getMessage() for one in caplog.records if one.exc_info] == []
