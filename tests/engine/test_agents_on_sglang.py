"""Agents of others with a real SGLang server behind the endpoint: what is recorded is what it sampled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import aiohttp
import numpy as np
import pytest
from agent_models import CLOSE, END, OPEN, make_tokenizer, served
from anthropic import AsyncAnthropic
from engine_models import SGLANG_KEY, TOLERANCE, EngineClient, TinyModel, log_p
from openai import AsyncOpenAI, LengthFinishReasonError

from system.agents.endpoint import AgentEndpoint
from system.engine.protocol import Chunk, GenerateRequest
from system.rollout.codec import ChatCodec
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


@pytest.fixture
async def engine(sglang_url: str, tiny: Any, stack: AsyncExitStack) -> Watched:
    """The server of the session, with the weights of ``tiny("qwen3", False)``."""
    made = Watched([sglang_url], deadline_s=300, stall_s=120, key=SGLANG_KEY)
    stack.push_async_callback(made.close)
    if (await made.infos())[0].weight_version:
        await made.update_weights_from_disk(str(tiny("qwen3", False).path), 0)
    return made


def check_turns(episode: Any, model: TinyModel, left: list[tuple[GenerateRequest, list[Chunk]]]) -> int:
    """Every turn of an episode of one chain is what the server sampled behind just these tokens, and what
    transformers has; what was found is taken out of ``left``.  Returns the number of turns.
    """
    assert episode.rewrites == 0
    (end,) = episode.chosen
    turns = [i for i in episode.forest.path(end) if episode.forest.pieces[i].kind == Kind.MODEL]
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
    return len(turns)


async def test_what_agents_are_told_is_recorded_as_sglang_sampled_it(
    engine: Watched, tiny: Any, stack: AsyncExitStack
) -> None:
    model: TinyModel = tiny("qwen3", False)
    endpoint = AgentEndpoint(served(engine, max_context=500))
    await endpoint.start()
    stack.push_async_callback(endpoint.stop)

    sessions = [await endpoint.open("p", seed, deadline_s=300) for seed in range(6)]
    await asyncio.gather(*(talk(session, seed) for seed, session in enumerate(sessions)))
    assert len(engine.asked) == 18
    left = list(engine.asked)
    for session in sessions:
        assert check_turns(session.close(Outcome.ENDED), model, left) == 3

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


# Random weights make no calls by themselves: here many a token is a whole call, and many another ends a turn.
LOOKS = [f'{OPEN}\n{{"name": "look", "arguments": {{"word": "{i}"}}}}\n{CLOSE}' for i in range(48)]
ENDS = range(94, 134)  # bytes that no prompt here has
WORD = {"type": "object", "properties": {"word": {}}}


async def look_by_openai(session: Any, stream: bool) -> int:
    """Ask, and look up what is called for; returns how many were made."""
    function = {"type": "function", "function": {"name": "look", "description": "", "parameters": WORD}}
    messages: list[Any] = [{"role": "user", "content": "?"}]
    asked: dict[str, Any] = {"model": "m", "messages": messages, "tools": [function], "max_tokens": 20}
    made = 0
    async with AsyncOpenAI(base_url=session.openai_url, api_key="any", timeout=300) as sdk:
        for _ in range(2):
            if stream:
                async with sdk.chat.completions.stream(**asked) as events:
                    try:
                        answer = (await events.get_final_completion()).choices[0].message
                    except LengthFinishReasonError:  # a turn that has no end
                        break
            else:
                answer = (await sdk.chat.completions.create(**asked)).choices[0].message
            calls = answer.tool_calls or []
            made += len(calls)
            if not 1 <= len(calls) <= 2:  # more would not fit
                break
            messages.append(answer.model_dump(exclude_none=True, exclude={"parsed"}))
            messages += [{"role": "tool", "tool_call_id": call.id, "content": "a"} for call in calls]
    return made


async def look_by_anthropic(session: Any, stream: bool) -> int:
    """The same in Anthropic's words."""
    messages: list[Any] = [{"role": "user", "content": "?"}]
    tools = [{"name": "look", "description": "", "input_schema": WORD}]
    asked: dict[str, Any] = {"model": "m", "messages": messages, "tools": tools, "max_tokens": 20}
    made = 0
    async with AsyncAnthropic(base_url=session.anthropic_url, api_key="any", timeout=300) as sdk:
        for _ in range(2):
            if stream:
                async with sdk.messages.stream(**asked) as events:
                    answer = await events.get_final_message()
            else:
                answer = await sdk.messages.create(**asked)
            calls = [block for block in answer.content if block.type == "tool_use"]
            made += len(calls)
            if not 1 <= len(calls) <= 2:
                break
            told = [block.model_dump(exclude_none=True) for block in answer.content]
            results = [{"type": "tool_result", "tool_use_id": call.id, "content": "a"} for call in calls]
            messages += [{"role": "assistant", "content": told}, {"role": "user", "content": results}]
    return made


async def test_calls_by_both_providers_clients_are_recorded_as_sglang_sampled_them(
    engine: Watched, tiny: Any, stack: AsyncExitStack
) -> None:
    model: TinyModel = tiny("qwen3", False)
    tokenizer = make_tokenizer(LOOKS)
    ends = [tokenizer.convert_tokens_to_ids(END), *ENDS]
    endpoint = AgentEndpoint(
        replace(served(engine, tokenizer, max_context=500), rendering=ChatCodec(tokenizer, ends=ends))
    )
    await endpoint.start()
    stack.push_async_callback(endpoint.stop)
    sessions = [await endpoint.open("p", seed, deadline_s=300) for seed in range(64)]
    agents = [
        (look_by_openai, look_by_anthropic)[seed % 2](session, seed % 4 > 1)
        for seed, session in enumerate(sessions)
    ]
    made = await asyncio.gather(*agents)
    left = list(engine.asked)
    turns = [check_turns(session.close(Outcome.ENDED), model, left) for session in sessions]
    assert not left
    for kind in range(4):  # each client, streamed and not
        assert sum(made[kind::4]) > 0, made
    for client in range(2):  # was told what came of its calls, and went on
        assert sum(turns[client::2]) > len(turns[client::2]), turns
