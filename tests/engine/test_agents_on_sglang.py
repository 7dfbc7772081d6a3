"""Agents of others with a real SGLang server behind the endpoint: what is recorded is what it sampled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import numpy as np
import pytest
from agent_models import served
from engine_models import SGLANG_KEY, TOLERANCE, EngineClient, TinyModel, log_p
from openai import AsyncOpenAI

from system.agents.endpoint import AgentEndpoint
from system.engine.protocol import Chunk, GenerateRequest
from system.tree.record import Kind, Outcome

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(400)]


class Watched(EngineClient):
    """Keeps what came from the server, by request: its prompt, and the chunks as they were read."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self.asked: list[tuple[GenerateRequest, list[Chunk]]] = []

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk]:
        chunks: list[Chunk] = []
        self.asked.append((request, chunks))
        async for chunk in super().generate(request):
            chunks.append(chunk)
            yield chunk

    async def running(self) -> int:
        return (await self.infos())[0].running


async def talk(session: Any, seed: int) -> None:
    """Three turns, every second one streamed."""
    messages: list[Any] = [{"role": "user", "content": f"Say {seed}"}]
    async with AsyncOpenAI(base_url=session.openai_url, api_key="any", timeout=300) as sdk:
        for turn in range(3):
            asked: dict[str, Any] = {"model": "m", "messages": messages, "max_tokens": 12}
            if (turn + seed) % 2:
                stream = await sdk.chat.completions.create(**asked, stream=True)
                parts = [part async for part in stream]
                text = "".join(part.choices[0].delta.content or "" for part in parts)
            else:
                text = (await sdk.chat.completions.create(**asked)).choices[0].message.content
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And?"}]


async def test_what_agents_are_told_is_recorded_as_sglang_sampled_it(
    sglang_url: str, tiny: Any, stack: AsyncExitStack
) -> None:
    model: TinyModel = tiny("qwen3", False)
    engine = Watched([sglang_url], deadline_s=300, stall_s=120, key=SGLANG_KEY)
    stack.push_async_callback(engine.close)
    if (await engine.infos())[0].weight_version:
        await engine.update_weights_from_disk(str(model.path), 0)
    endpoint = AgentEndpoint(served(engine, max_context=500))
    await endpoint.start()
    stack.push_async_callback(endpoint.stop)

    sessions = [await endpoint.open("p", seed, deadline_s=300) for seed in range(6)]
    await asyncio.gather(*(talk(session, seed) for seed, session in enumerate(sessions)))
    assert len(engine.asked) == 18
    left = list(engine.asked)
    for session in sessions:
        episode = session.close(Outcome.ENDED)
        assert episode.rewrites == 0
        (end,) = episode.chosen
        turns = [i for i in episode.forest.path(end) if episode.forest.pieces[i].kind == Kind.MODEL]
        assert len(turns) == 3
        for number in turns:
            piece = episode.forest.pieces[number]
            before = episode.forest.tokens(piece.parent)
            record = next(
                one
                for one in left
                if np.array_equal(one[0].input_ids, before)
                and np.array_equal(np.concatenate([chunk.tokens for chunk in one[1]]), piece.tokens)
            )
            left.remove(record)
            for name in ("logprob", "entropy", "version"):
                said = np.concatenate([getattr(chunk, name) for chunk in record[1]])
                np.testing.assert_array_equal(getattr(piece, name), said)
            assert piece.trained
            own = log_p(model, before, piece.tokens, 1.0)[np.arange(piece.tokens.size), piece.tokens]
            np.testing.assert_allclose(piece.logprob, own.numpy(), atol=TOLERANCE, rtol=0)

    # A client that hangs up: nothing is recorded, and the server ends the request.
    session = await endpoint.open("p", 9, deadline_s=300)
    body = {"model": "m", "messages": [{"role": "user", "content": "?"}], "max_tokens": 400, "stream": True}
    async with aiohttp.ClientSession() as http:
        answer = await http.post(f"{session.openai_url}/chat/completions", json=body)
        async with asyncio.timeout(120):
            while not (len(engine.asked) == 19 and engine.asked[-1][1]):  # noqa: ASYNC110 (a stream)
                await asyncio.sleep(0.01)
        answer.close()
    async with asyncio.timeout(120):
        while await engine.running():  # noqa: ASYNC110 (a server's state)
            await asyncio.sleep(0.1)
    assert not any(chunk.finish for chunk in engine.asked[-1][1])
    assert not any(p.kind == Kind.MODEL for p in session.close(Outcome.ENDED).forest.pieces)
