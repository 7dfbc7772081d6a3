"""OpenAI's client, unchanged, against the endpoint: responses."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
from agent_models import ADD, CLOSE, END, LOOK, OPEN, THINK, THOUGHT, WONDER
from test_chat_sdk import TOOLS as CHAT_TOOLS
from test_chat_sdk import client

from system.engine.protocol import EngineError
from system.tree.record import Kind, Outcome

Start = Callable[..., Awaitable[tuple[Any, Any]]]
TOOLS: list[Any] = [{"type": "function", **tool["function"]} for tool in CHAT_TOOLS]
LINE = f"{THINK}{WONDER}{THOUGHT}\n\nBoth. {OPEN}{ADD}{CLOSE}\n{OPEN}{LOOK}{CLOSE}{END}"


async def answered(sdk: Any, stream: bool, **asked: Any) -> Any:
    if not stream:
        return await sdk.responses.create(model="m", tools=TOOLS, **asked)
    async with sdk.responses.stream(model="m", tools=TOOLS, **asked) as events:
        async for _ in events:
            pass
        return await events.get_final_response()


def results(answer: Any) -> list[Any]:
    return [
        {"type": "function_call_output", "call_id": item.call_id, "output": f"of {item.arguments}"}
        for item in answer.output
        if item.type == "function_call"
    ]


async def agent(sdk: Any, stream: bool, by_id: bool) -> int:
    """Turns of an agent that sends all it knows, or names the answer that it goes on from."""
    history: list[Any] = [{"role": "user", "content": "What is it?"}]
    more: dict[str, Any] = {"input": history}
    for turn in range(1, 9):
        answer = await answered(sdk, stream, instructions="Be exact.", **more)
        told = results(answer)
        if not told:
            return turn
        history += [item.model_dump(exclude_none=True) for item in answer.output] + told
        more = {"input": told, "previous_response_id": answer.id} if by_id else {"input": history}
    return 8


@pytest.mark.parametrize("by_id", [False, True])
async def test_every_turn_of_real_agents_is_what_the_engine_sampled(place: Any, by_id: bool) -> None:
    async def one(seed: int) -> int:
        session = await place.open(seed)
        async with client(session) as sdk:
            turns = await agent(sdk, seed % 2 == 1, by_id)
        episode = session.close(Outcome.ENDED)
        (end,) = episode.chosen
        path = [episode.forest.pieces[i] for i in episode.forest.path(end)]
        assert episode.rewrites == 0
        assert [piece.kind for piece in path] == [Kind.TOOL, Kind.MODEL] * turns
        assert all(piece.trained for piece in path[1::2])
        assert place.books.check(episode.forest) == turns
        return turns

    turns = await asyncio.gather(*(one(seed) for seed in range(12)))
    assert sum(turns) == len(place.books)
    assert max(turns) > 1


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_in_its_words(scripted: Start, stream: bool) -> None:
    there, _ = await scripted(LINE)
    session = await there.open()
    async with client(session) as sdk:
        answer = await answered(sdk, stream, input="?")
    thought, text, add, look = answer.output
    assert thought.content[0].text == "What may it be?"
    assert answer.output_text == text.content[0].text == "Both."
    assert (add.name, add.arguments) == ("add", '{"a":1,"b":2}')
    assert (look.name, look.arguments) == ("look", '{"word":"ü"}')
    assert answer.status == "completed"
    assert answer.usage.output_tokens == session.close(Outcome.ENDED).forest.pieces[1].tokens.size


async def test_each_event_of_a_stream_is_in_its_place(scripted: Start) -> None:
    there, _ = await scripted(LINE)
    session = await there.open()
    async with client(session) as sdk:
        stream = await sdk.responses.create(model="m", tools=TOOLS, input="?", stream=True)
        events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.type for item in done] == ["reasoning", "message", "function_call", "function_call"]
    assert [item.model_dump() for item in done] == [item.model_dump() for item in events[-1].response.output]


async def test_an_answer_that_was_cut_is_incomplete(scripted: Start) -> None:
    there, _ = await scripted("Some longer answer." + END)
    session = await there.open()
    async with client(session) as sdk:
        answer = await sdk.responses.create(model="m", input="?", max_output_tokens=4)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output_text == "Some"


async def test_a_stream_that_fails_says_so(scripted: Start) -> None:
    there, _ = await scripted(EngineError("broken"))
    session = await there.open()
    async with client(session) as sdk:
        stream = await sdk.responses.create(model="m", input="?", stream=True)
        with pytest.raises(openai.APIError, match="broken"):
            async for _ in stream:
                pass
    assert not session.close(Outcome.ENDED).forest.pieces


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}}, "text.format"),
        ({"tools": [{"type": "web_search"}]}, "none runs here"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, r"input\[0\]"),
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"input": []}, "messages: there is none"),
    ],
)
async def test_what_is_not_served_is_refused_by_name(
    scripted: Start, change: dict[str, Any], says: str
) -> None:
    there, engine = await scripted()
    session = await there.open()
    async with client(session) as sdk:
        with pytest.raises(openai.APIStatusError, match=says) as caught:
            await sdk.responses.create(**{"model": "m", "input": "?", **change})
    assert caught.value.status_code in (400, 404)
    assert not engine.requests
