"""Anthropic's client, unchanged, against the endpoint and a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import anthropic
import pytest
from agent_models import ADD, CLOSE, DONE, END, LOOK, OPEN, THINK, THOUGHT, WONDER

from system.tree.record import Kind, Outcome

TOOLS: list[Any] = [
    {
        "name": name,
        "description": f"To {name}.",
        "input_schema": {
            "type": "object",
            "properties": {key: {"type": "string"} for key in keys},
            "required": keys,
        },
    }
    for name, keys in (("add", ["a", "b"]), ("look", ["word"]))
]


def client(session: Any) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=session.anthropic_url, api_key="anything")


async def agent(claude: anthropic.AsyncAnthropic, stream: bool, most: int = 8) -> list[Any]:
    messages: list[Any] = [{"role": "user", "content": "What is it?"}]
    for _ in range(most):
        asked: dict[str, Any] = {
            "model": "claude-any",
            "max_tokens": 500,
            "system": [{"type": "text", "text": "Be exact.", "cache_control": {"type": "ephemeral"}}],
            "messages": messages,
            "tools": TOOLS,
        }
        if stream:
            async with claude.messages.stream(**asked) as events:
                answer = await events.get_final_message()
        else:
            answer = await claude.messages.create(**asked)
        messages.append(
            {
                "role": "assistant",
                "content": [block.model_dump(exclude_none=True) for block in answer.content],
            }
        )
        if answer.stop_reason != "tool_use":
            break
        results = [
            {
                "type": "tool_result",
                "tool_use_id": block.id,
                "content": [{"type": "text", "text": f"{block.name} of {sorted(block.input)}"}],
            }
            for block in answer.content
            if block.type == "tool_use"
        ]
        messages.append({"role": "user", "content": results})
    return messages


async def test_every_turn_of_real_agents_is_what_the_engine_sampled(place: Any) -> None:
    kinds = set[str]()
    turns = 0
    for seed in range(12):
        session = await place.open(seed)
        async with client(session) as claude:
            messages = await agent(claude, stream=seed % 2 == 1)
        episode = session.close(Outcome.ENDED)
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        for blocks in said:
            kinds |= {block["type"] for block in blocks}
            kinds |= {"parallel"} if sum(block["type"] == "tool_use" for block in blocks) > 1 else set()
        assert episode.rewrites == 0
        (end,) = episode.chosen
        path = [episode.forest.pieces[i] for i in episode.forest.path(end)]
        assert [piece.kind for piece in path] == [Kind.TOOL, Kind.MODEL] * len(said)
        assert all(piece.trained for piece in path[1::2])
        assert place.books.check(episode.forest) == len(said)
        turns += len(said)
    assert turns == len(place.books)
    assert kinds == {"thinking", "text", "tool_use", "parallel"}


Start = Callable[..., Awaitable[tuple[Any, Any]]]
LINE = f"{THINK}{WONDER}{THOUGHT}\n\nBoth. {OPEN}{ADD}{CLOSE}\n{OPEN}{LOOK}{CLOSE}{END}"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_in_its_words(scripted: Start, stream: bool) -> None:
    there, _ = await scripted(LINE)
    session = await there.open()
    asked: dict[str, Any] = {
        "model": "m",
        "max_tokens": 500,
        "messages": [{"role": "user", "content": "?"}],
        "tools": TOOLS,
    }
    async with client(session) as claude:
        if stream:
            async with claude.messages.stream(**asked) as events:
                answer = await events.get_final_message()
        else:
            answer = await claude.messages.create(**asked)
        counted = await claude.messages.count_tokens(
            model="m", messages=asked["messages"], tools=asked["tools"]
        )
    thought, text, add, look = answer.content
    assert (thought.type, thought.thinking) == ("thinking", "What may it be?")
    assert (text.type, text.text) == ("text", "Both.")
    assert (add.type, add.name, add.input) == ("tool_use", "add", {"a": 1, "b": 2})
    assert (look.type, look.name, look.input) == ("tool_use", "look", {"word": "ü"})
    assert answer.stop_reason == "tool_use"
    assert answer.usage.input_tokens == counted.input_tokens
    assert answer.usage.output_tokens == session.close(Outcome.ENDED).forest.pieces[1].tokens.size


async def test_a_system_message_among_the_others_and_one_above_them_are_the_same(scripted: Start) -> None:
    there, _ = await scripted(DONE + END, DONE + END)
    session = await there.open()
    async with client(session) as claude:
        first = await claude.messages.create(
            model="m", max_tokens=9, system="Be brief.", messages=[{"role": "user", "content": "?"}]
        )
        inside: list[Any] = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "?"}]},
            {"role": "assistant", "content": first.content[0].text},
            {"role": "user", "content": "And?"},
        ]
        await claude.messages.create(model="m", max_tokens=9, messages=inside)
    episode = session.close(Outcome.ENDED)
    assert episode.rewrites == 0
    assert [piece.parent for piece in episode.forest.pieces] == [-1, 0, 1, 2]


async def test_silence_is_filled_and_blocks_stay_whole(scripted: Start) -> None:
    there, engine = await scripted(LINE, endpoint={"keep_alive_s": 0.05})
    engine.going.clear()
    session = await there.open()
    seen: list[str] = []
    async with (
        client(session) as claude,
        claude.messages.stream(
            model="m", max_tokens=500, messages=[{"role": "user", "content": "?"}], tools=TOOLS
        ) as events,
    ):
        async for event in events:
            seen.append(event.type)
            if event.type == "content_block_delta" and seen.count("content_block_delta") == 3:
                engine.going.set()
        answer = await events.get_final_message()
    assert answer.content[0].thinking == "What may it be?"
    assert seen.count("content_block_start") == seen.count("content_block_stop") == 4


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "BadRequestError",
            "none runs here",
        ),
        ({"extra_body": {"output_config": {"format": {"type": "json_schema"}}}}, "BadRequestError", "format"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "BadRequestError",
            r"messages\[0\].content\[0\]",
        ),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "BadRequestError", "prompt is too long"),
        (
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "It"}]},
            "BadRequestError",
            "not gone on with",
        ),
    ],
)
async def test_what_is_not_served_is_refused_in_its_shape(
    scripted: Start, change: dict[str, Any], error: str, says: str
) -> None:
    there, engine = await scripted()
    session = await there.open()
    asked: dict[str, Any] = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "?"}]}
    async with client(session) as claude:
        with pytest.raises(getattr(anthropic, error), match=says) as caught:
            await claude.messages.create(**{**asked, **change})
        assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert not engine.requests


async def test_a_failing_engine_and_a_spent_session(scripted: Start) -> None:
    from system.engine.protocol import EngineLost

    there, engine = await scripted(EngineLost("down"), DONE + END)
    session = await there.open(turns=1)
    async with client(session) as claude:
        asked: dict[str, Any] = {
            "model": "m",
            "max_tokens": 9,
            "messages": [{"role": "user", "content": "?"}],
        }
        answer = await claude.messages.create(**asked)  # tries twice
        assert answer.content[0].text.startswith("The answer")
        with pytest.raises(anthropic.RateLimitError, match="1 turns of this session are spent"):
            await claude.messages.create(**asked)
    await asyncio.sleep(0)
    assert len(engine.requests) == 2
    assert session.close(Outcome.ENVIRONMENT).outcome == Outcome.TURN_LIMIT
