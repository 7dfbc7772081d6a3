"""OpenAI's client, unchanged, against the endpoint and a real engine: chat completions."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from openai import AsyncOpenAI

from system.tree.record import Kind, Outcome

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"To {name}.",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string"} for key in keys},
                "required": keys,
            },
        },
    }
    for name, keys in (("add", ["a", "b"]), ("look", ["word"]))
]


def client(session: Any) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=session.openai_url, api_key="anything", max_retries=2)


async def agent(openai: AsyncOpenAI, stream: bool, most: int = 8) -> list[Any]:
    """The plainest agent there is: asks, calls, tells, until there is nothing to call."""
    messages: list[Any] = [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": "What is it?"},
    ]
    for _ in range(most):
        asked = {"model": "gpt-4o", "messages": messages, "tools": TOOLS, "temperature": 0.2}
        if stream:
            async with openai.chat.completions.stream(**asked) as events:
                async for _event in events:
                    pass
                answer = (await events.get_final_completion()).choices[0]
        else:
            answer = (await openai.chat.completions.create(**asked)).choices[0]
        message = answer.message
        messages.append(message.model_dump(exclude_none=True, exclude={"parsed"}))
        if answer.finish_reason != "tool_calls":
            break
        for call in message.tool_calls or []:
            arguments = json.loads(call.function.arguments)
            result = str(arguments["a"] + arguments["b"]) if call.function.name == "add" else "a letter"
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return messages


async def test_every_turn_of_real_agents_is_what_the_engine_sampled(place: Any) -> None:
    turns, kinds = 0, set[str]()
    for seed in range(12):
        session = await place.open(seed)
        async with client(session) as openai:
            messages = await agent(openai, stream=seed % 2 == 1)
        episode = session.close(Outcome.ENDED)
        said = [message for message in messages if message["role"] == "assistant"]
        for message in said:
            kinds |= {key for key in message if message[key]}
            kinds |= {"parallel"} if len(message.get("tool_calls", ())) > 1 else set()
        assert episode.rewrites == 0
        assert len(episode.chosen) == 1
        path = episode.forest.path(episode.chosen[0])
        assert [episode.forest.pieces[i].kind for i in path] == [Kind.TOOL, Kind.MODEL] * len(said)
        assert all(episode.forest.pieces[i].trained for i in path[1::2])
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        told = [message for message in messages[:last] if message["role"] == "tool"]
        assert len(episode.calls) == len(told)
        assert place.books.check(episode.forest) == len(said)
        turns += len(said)
    assert turns == len(place.books)  # nothing was sampled besides
    assert {"content", "tool_calls", "reasoning_content", "parallel"} <= kinds


async def test_two_hundred_sessions_at_once(place: Any) -> None:
    async def one(seed: int) -> int:
        session = await place.open(seed)
        async with client(session) as openai:
            messages = await agent(openai, stream=seed % 2 == 1, most=3)
        episode = session.close(Outcome.ENDED)
        assert len(episode.chosen) == 1
        turns = place.books.check(episode.forest)
        assert turns == sum(message["role"] == "assistant" for message in messages)
        return turns

    assert sum(await asyncio.gather(*(one(seed) for seed in range(200)))) == len(place.books)
