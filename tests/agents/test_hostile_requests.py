"""Whatever a client sends, it is served or told what is wrong: it never meets a fault of ours."""

from __future__ import annotations

import copy
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from agent_models import DONE, END
from hypothesis import given
from hypothesis import strategies as st
from test_chat_sdk import TOOLS

from system.agents.messages import ChatRequest, Refusal
from system.agents.wire_anthropic import AnthropicWire
from system.agents.wire_chat import ChatWire
from system.agents.wire_responses import ResponsesWire
from system.tree.record import Outcome

Start = Callable[..., Awaitable[tuple[Any, Any]]]
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "?"}]},
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
    ],
    "tools": TOOLS,
    "stop": ["x"],
    "max_tokens": 5,
    "temperature": 1,
    "stream": False,
    "stream_options": {"include_usage": True},
    "response_format": {"type": "text"},
    "tool_choice": "auto",
}
ANTHROPIC: dict[str, Any] = {
    "model": "m",
    "max_tokens": 5,
    "system": [{"type": "text", "text": "s"}],
    "messages": [
        {"role": "user", "content": "?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "text", "text": "So."},
                {"type": "tool_use", "id": "c", "name": "add", "input": {"a": 1}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "3"}]},
    ],
    "tools": [
        {"name": "add", "input_schema": {"type": "object", "properties": {"a": {}}, "required": ["a"]}}
    ],
    "tool_choice": {"type": "auto"},
    "stop_sequences": ["x"],
    "output_config": {"effort": "low"},
}
RESPONSES: dict[str, Any] = {
    "model": "m",
    "instructions": "s",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "?"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c", "output": "3"},
    ],
    "tools": [{"type": "function", **TOOLS[0]["function"]}],
    "text": {"format": {"type": "text"}},
    "max_output_tokens": 5,
}
WHOLE = ((ChatWire(), CHAT), (AnthropicWire(), ANTHROPIC), (ResponsesWire(), RESPONSES))
ODD: list[Any] = [None, 0, -1, 1.5, True, "", "word", "\ud800", "{", "[1]", [], {}, [[]], [None], 10**30]
ODD += [{"type": "text"}, {"type": "text", "text": {}}, [{"type": "elf"}]]


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [way] if way else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        found += places(one, (*way, key))
    return found


@pytest.mark.parametrize(("wire", "body"), WHOLE, ids=lambda it: getattr(it, "name", ""))
def test_the_bodies_are_served_as_they_are(wire: Any, body: dict[str, Any]) -> None:
    request = wire.asked(body)
    assert [one.role for one in request.messages] == ["system", "user", "assistant", "tool"]
    assert request.messages[2].reasoning == "Hm."
    assert request.messages[2].calls[0].arguments == '{"a":1}'
    assert request.messages[3].tool == "add"
    assert request.max_tokens == 5


@given(st.sampled_from(WHOLE), st.data())
def test_a_broken_body_is_refused_by_name_or_read(
    one: tuple[Any, dict[str, Any]], data: st.DataObject
) -> None:
    wire, whole = one
    body = copy.deepcopy(whole)
    for way in data.draw(st.lists(st.sampled_from(places(whole)), min_size=1, max_size=3)):
        at: Any = body
        try:
            for key in way[:-1]:
                at = at[key]
            at[way[-1]] = data.draw(st.sampled_from(ODD))
        except (KeyError, IndexError, TypeError):
            continue
    request: ChatRequest | None = None
    refused: Refusal | None = None
    try:
        request = wire.asked(body)
    except Refusal as refusal:
        refused = refusal
    if refused is not None:
        assert refused.status == 400
        assert wire.error(refused)["error"]["message"]
        return
    assert request is not None
    assert len(request.prefixes()) == len(request.messages) + 1
    assert all(isinstance(spec.primary, str) for spec in request.specs().values())
    json.dumps([message.rendered() for message in request.messages])


async def test_half_characters_are_replaced(scripted: Start) -> None:
    call = '<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}</tool_call>'
    there, engine = await scripted(call + END)
    session = await there.open()
    tool = {"type": "function", "function": {"name": "add", "description": "\ud800"}}
    body = {
        "model": "m\udfff",
        "messages": [{"role": "user", "content": "a\ud800b"}],
        "tools": [tool],
        "stream": True,
    }
    async with (
        aiohttp.ClientSession() as http,
        http.post(
            f"{session.openai_url}/chat/completions",
            data=json.dumps(body),
            headers={"Content-Type": "application/json"},
        ) as answer,
    ):
        assert answer.status == 200
        said = await answer.text()
    assert said.endswith("[DONE]\n\n")
    assert '"name":"add"' in said
    assert "a\ufffdb" in engine.tokenizer.decode(engine.requests[0].input_ids)
    session.close(Outcome.ENDED)


async def test_a_reward_is_reported_and_the_end_told(scripted: Start) -> None:
    there, _ = await scripted(DONE + END)
    session = await there.open()
    async with aiohttp.ClientSession() as http:

        async def post(what: str, body: Any) -> tuple[int, Any]:
            async with http.post(f"{session.anthropic_url}/{what}", json=body) as answer:
                return answer.status, await answer.json()

        assert (await post("reward", {"reward": "much"}))[0] == 400
        assert (await post("reward", {"reward": 1, "correct": 1}))[0] == 400
        assert (await post("reward", {"reward": 0.5, "correct": True, "note": "well"}))[0] == 200
        assert (await post("done", {}))[0] == 200
        status, error = await post("v1/chat/completions", CHAT)
        assert (status, error["error"]["message"]) == (409, "the session is done")
    episode = session.close(Outcome.ENDED)
    assert (episode.reward, episode.correct, episode.outcome) == (0.5, 1, Outcome.ENDED)
    assert episode.result["note"] == "well"


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("raw", "headers", "says"),
    [
        (b'{"model": "m\xed\xa0\x80"}', {}, "the body is no JSON"),
        (json.dumps(CHAT).encode("utf-16"), {}, "the body is no JSON"),
        (b"no gzip", {"Content-Encoding": "gzip"}, "the body cannot be read"),
        (b"[" * 100_000, {}, "the body is no JSON"),
    ],
)
async def test_a_body_that_cannot_be_read_is_refused(
    scripted: Start, raw: bytes, headers: dict[str, str], says: str
) -> None:
    there, engine = await scripted(DONE + END)
    session = await there.open()
    headers = {"Content-Type": "application/json", **headers}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http:
        for path in ("v1/chat/completions", "v1/messages", "v1/messages/count_tokens", "reward"):
            async with http.post(f"{session.anthropic_url}/{path}", data=raw, headers=headers) as answer:
                assert answer.status == 400
                assert says in (await answer.json())["error"]["message"]
    assert not engine.requests
    session.close(Outcome.ENDED)


@pytest.mark.parametrize("where", ["schema", "arguments"])
async def test_what_is_nested_too_deeply_is_refused(scripted: Start, where: str) -> None:
    """Not a fault of ours, at which a client would send it again."""
    there, _ = await scripted(DONE + END)
    session = await there.open()
    body = copy.deepcopy(CHAT)
    if where == "schema":
        body["tools"][0]["function"]["parameters"]["properties"]["a"] = nested(600)
    else:
        body["messages"][2]["tool_calls"][0]["function"]["arguments"] = (
            '{"a": ' + json.dumps(nested(600)) + "}"
        )
    anthropic: dict[str, Any] = {
        "model": "m",
        "max_tokens": 1,
        "messages": [{"role": "user", "content": "?"}],
    }
    anthropic["tools"] = [{"name": "a", "input_schema": {"type": "object", "properties": {"a": nested(600)}}}]
    async with aiohttp.ClientSession() as http:
        async with http.post(f"{session.openai_url}/chat/completions", json=body) as answer:
            assert answer.status == 400, await answer.text()
        async with http.post(f"{session.anthropic_url}/v1/messages/count_tokens", json=anthropic) as answer:
            assert answer.status == 400, await answer.text()
    session.close(Outcome.ENDED)
