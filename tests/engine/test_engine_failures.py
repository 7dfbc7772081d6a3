"""The embedded engine when something goes wrong inside: its requests are told, and it goes on, or ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp
import numpy as np
import pytest
from engine_models import Served, TinyModel, assert_exact, collect, joined, prompt, request

from actors import engine as engine_actor
from system.config import EngineConfig
from system.engine.embedded import EmbeddedEngine, scheduler
from system.engine.embedded.__main__ import _serve
from system.engine.protocol import Chunk, EngineError, EngineLost


class Faulty:
    """A decoder whose passes fail as long as ``times`` says."""

    def __init__(self, engine: EmbeddedEngine, times: int) -> None:
        self.decoder, self.times = engine._scheduler._decoder, times
        engine._scheduler._decoder = self  # type: ignore[assignment]

    def forward(self, *given: Any) -> Any:
        if self.times:
            self.times -= 1
            raise RuntimeError("out of memory, say")
        return self.decoder.forward(*given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)


@pytest.fixture
async def one(serve: Callable[..., Any]) -> Served:
    return await serve("qwen3", True)


async def together(served: Served, prompts: list[Any]) -> list[Chunk]:
    """The answers to ``prompts`` that are admitted in one step, in this order."""
    await served.client.pause("retract")
    asked = []
    for number, ids in enumerate(prompts):
        asked.append(asyncio.create_task(collect(served.client, request(str(number), ids, 8))))
        async with asyncio.timeout(60):
            while served.engine._scheduler.waiting <= number:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
    await served.client.post("/continue_generation")
    return [joined(chunks) for chunks in await asyncio.gather(*asked)]


async def test_a_prompt_of_one_token_behind_another(one: Served) -> None:
    prompts = [prompt(40), np.zeros(1, np.int32), prompt(1), np.zeros(1, np.int32), prompt(40)]
    for ids, answer in zip(prompts, await together(one, prompts), strict=True):
        assert_exact(one.model, ids, answer, 1.0)


async def test_a_step_that_fails_costs_no_token(one: Served) -> None:
    """Its requests hear of it, and the client goes on with them where they were."""
    Faulty(one.engine, 1)
    prompts = [prompt(30), prompt(20, 1), prompt(1)]
    for ids, answer in zip(prompts, await together(one, prompts), strict=True):
        assert_exact(one.model, ids, answer, 1.0)
    assert one.engine.loop.alive


async def test_a_request_that_fails_whenever_it_is_tried_ends_alone(one: Served) -> None:
    faulty = Faulty(one.engine, scheduler.FAILED_STEPS - 1)
    with pytest.raises(EngineError, match="RuntimeError: out of memory, say") as failed:
        await collect(one.client, request("bad", prompt(9)))
    assert not isinstance(failed.value, EngineLost)  # the engine is there
    faulty.times = 0
    assert_exact(one.model, prompt(9), joined(await collect(one.client, request("good", prompt(9)))), 1.0)
    assert one.engine.loop.alive


async def test_a_server_whose_engine_died_ends(
    tiny: Callable[..., TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it is started again: it would answer 503 for ever."""
    monkeypatch.setattr(scheduler, "FAILED_STEPS", 2)
    engine = EmbeddedEngine(EngineConfig(device="cpu", max_running=2, cache_slots=0), tiny().path)
    Faulty(engine, 1000)
    given_up: list[str] = []
    monkeypatch.setattr(engine_actor, "_give_up", given_up.append)
    actor = engine_actor.EngineActor.__new__(engine_actor.EngineActor)
    actor._server = engine

    async def ask() -> None:
        body = {"rid": "r", "stream": True, "input_ids": [1], "sampling_params": {"max_new_tokens": 4}}
        async with aiohttp.ClientSession() as session:
            for code in (500, 503):
                while engine._server is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                async with session.post(f"{engine._server.url}/generate", json=body) as answer:  # type: ignore[union-attr]
                    assert f'"code":{code}' in await answer.text()

    asking = asyncio.create_task(ask())
    async with asyncio.timeout(60):
        with pytest.raises(SystemExit, match="RuntimeError: out of memory"):
            await _serve(engine, None, 0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    actor._watch_embedded()
    assert given_up == ["RuntimeError: out of memory, say"]


async def test_a_stopped_engine_has_not_died(one: Served) -> None:
    await one.engine.stop()
    assert one.engine.loop.wait() == ""
