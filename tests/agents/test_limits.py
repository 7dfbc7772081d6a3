"""What ends a session, and what an endpoint refuses: by name, in the provider's shape, and once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import anthropic
import openai
import pytest
from agent_models import DONE, END
from test_chat_sdk import client
from test_requests import USER, ask, said, trained

from system.engine.protocol import EngineError
from system.tree.record import Outcome

Start = Callable[..., Awaitable[tuple[Any, Any]]]
ANSWER = DONE + END


async def test_turns_are_counted_and_the_client_does_not_ask_again(scripted: Start) -> None:
    there, engine = await scripted(ANSWER)
    session = await there.open(turns=1)
    first = await ask(session, [USER])
    with pytest.raises(openai.RateLimitError, match="1 turns of this session are spent") as caught:
        await ask(session, [USER, said(first), USER])
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"
    assert len(engine.requests) == 1
    assert session.close(Outcome.ENDED).outcome == Outcome.TURN_LIMIT


async def test_turns_on_their_way_count(scripted: Start) -> None:
    there, engine = await scripted(ANSWER)
    engine.going.clear()
    session = await there.open(turns=1)
    first = asyncio.create_task(ask(session, [USER]))
    while not engine.requests:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    with pytest.raises(openai.RateLimitError):
        await ask(session, [USER])
    engine.going.set()
    assert (await first).message.content == DONE
    session.close(Outcome.ENDED)


async def test_a_full_context_is_said_so_and_may_be_mended(scripted: Start) -> None:
    there, _ = await scripted(ANSWER, max_context=700)
    session = await there.open()
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(session, [{"role": "user", "content": "x" * 700}])
    assert caught.value.code == "context_length_exceeded"
    assert (await ask(session, [USER])).message.content == DONE
    assert session.close(Outcome.ENDED).outcome == Outcome.ENDED

    session = await there.open()
    with pytest.raises(openai.BadRequestError):
        await ask(session, [{"role": "user", "content": "x" * 700}])
    assert session.close(Outcome.ENVIRONMENT).outcome == Outcome.LENGTH


async def test_an_answer_that_fills_the_context_ends_the_episode_by_length(scripted: Start) -> None:
    there, _ = await scripted("x" * 700 + END, max_context=700)
    session = await there.open()
    assert (await ask(session, [USER], tools=[])).finish_reason == "length"
    assert session.close(Outcome.ENDED).outcome == Outcome.LENGTH


async def test_the_deadline_ends_it(scripted: Start) -> None:
    there, engine = await scripted(ANSWER)
    engine.going.clear()
    session = await there.open(deadline_s=1.5)
    with pytest.raises(openai.ConflictError, match=r"1.5 s are over"):
        await ask(session, [USER])
    with pytest.raises(openai.ConflictError, match=r"1.5 s are over"):
        await ask(session, [USER])
    episode = session.close(Outcome.ENVIRONMENT)
    assert episode.outcome == Outcome.DEADLINE
    assert not episode.forest.pieces
    assert len(engine.requests) == 1
    with pytest.raises(openai.ConflictError, match="the session is closed"):
        await ask(session, [USER])


async def test_the_deadline_counts_no_standstill(scripted: Start) -> None:
    there, _ = await scripted(ANSWER)
    session = await there.open(deadline_s=3.0)
    await asyncio.sleep(0.05)
    time.sleep(4.0)  # noqa: ASYNC251 (what stands still)
    assert (await ask(session, [USER])).message.content == DONE
    assert session.quiet_s < 3.0
    assert session.close(Outcome.ENDED).outcome == Outcome.ENDED


async def test_keys_open_their_own_session_and_no_other(scripted: Start) -> None:
    there, _ = await scripted(ANSWER)
    session = await there.open()
    async with openai.AsyncOpenAI(base_url=f"{there.url}/v1", api_key=session.key) as sdk:
        assert [model.id for model in (await sdk.models.list()).data] == ["espalier", "espalier-frozen"]
        assert (await sdk.models.retrieve("gpt-4o")).id == "gpt-4o"
        await sdk.chat.completions.create(model="m", messages=[USER])  # the key alone is enough
    async with openai.AsyncOpenAI(base_url=f"{there.url}/v1", api_key=session.key[:-1]) as sdk:
        with pytest.raises(openai.AuthenticationError, match="no open session has this key"):
            await sdk.chat.completions.create(model="m", messages=[USER])
    assert trained(session.close(Outcome.ENDED)) == [1]


async def test_a_stream_that_fails_says_so(scripted: Start) -> None:
    there, _ = await scripted(EngineError("broken"))
    session = await there.open()
    async with client(session) as sdk:
        stream = await sdk.chat.completions.create(model="m", messages=[USER], stream=True)
        with pytest.raises(openai.APIError, match="broken"):
            async for _ in stream:
                pass
    assert not session.close(Outcome.ENDED).forest.pieces


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n": 2}, "n: one answer"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": []}, "messages: there is none"),
        ({"messages": [{"role": "elf", "content": ""}]}, r"messages\[0\].role"),
        ({"messages": [USER, {"role": "assistant", "content": "It"}]}, "not gone on with"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"messages\[0\].content\[0\]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"tools": [{"type": "custom", "custom": {"name": "x"}}]}}, r"tools\[0\]"),
    ],
)  # fmt: skip
async def test_what_is_not_served_is_refused_by_name(
    scripted: Start, change: dict[str, Any], says: str
) -> None:
    there, engine = await scripted()
    session = await there.open()
    with pytest.raises(openai.BadRequestError, match=says) as caught:
        await ask(session, **{"messages": [USER], **change})
    assert caught.value.type == "invalid_request_error"
    assert not engine.requests
    assert session.close(Outcome.ENDED).forest.pieces == []


async def test_other_fields_are_taken_and_a_tool_choice_is_counted(scripted: Start) -> None:
    there, engine = await scripted(ANSWER)
    session = await there.open()
    more: dict[str, Any] = {"tool_choice": "required", "top_p": 0.1, "seed": 4, "logprobs": True}
    more |= {"metadata": {"a": "b"}, "frequency_penalty": 1.0, "parallel_tool_calls": False}
    await ask(session, [USER], **more, extra_body={"thinking": {"budget": 1}})
    assert session.close(Outcome.ENDED).counters["tool_choice"] == 1
    assert (engine.requests[0].sampling.top_p, engine.requests[0].sampling.temperature) == (1.0, 1.0)


async def test_a_wrong_base_url_is_told_the_right_one(scripted: Start) -> None:
    there, _ = await scripted()
    session = await there.open()
    async with openai.AsyncOpenAI(base_url=session.anthropic_url, api_key="x") as sdk:
        with pytest.raises(openai.NotFoundError, match="base URL ends with /s/KEY/v1 for OpenAI") as caught:
            await sdk.chat.completions.create(model="m", messages=[USER])
    assert caught.value.type == "not_found_error"
    async with anthropic.AsyncAnthropic(base_url=session.openai_url, api_key="x") as claude:
        with pytest.raises(anthropic.NotFoundError, match="with /s/KEY for Anthropic") as failed:
            await claude.messages.create(model="m", max_tokens=9, messages=[USER])
    assert failed.value.body["error"]["type"] == "not_found_error"
    session.close(Outcome.ENDED)


async def test_fields_without_effect_are_listed_once(
    scripted: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "system.agents.endpoint")
    there, _ = await scripted(ANSWER, ANSWER)
    session = await there.open()
    for _ in range(2):
        await ask(session, [USER], metadata={"a": "b"}, extra_body={"thinking\n": 1}, stop=["x"])
    listed = [record.getMessage() for record in caplog.records]
    assert len(listed) == 1
    assert ": metadata, thinking" in listed[0]
    assert "stop" not in listed[0]


async def test_bodies_that_are_none(scripted: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("system.agents.endpoint.MAX_BODY_BYTES", 1000)
    there, _ = await scripted()
    session = await there.open()
    async with aiohttp.ClientSession() as http:
        for body, status in ((b"{", 400), (b"[]", 400), (b" " * 2000, 413)):
            async with http.post(
                f"{session.openai_url}/chat/completions",
                data=body,
                headers={"Content-Type": "application/json"},
            ) as answer:
                assert answer.status == status
                assert (await answer.json())["error"]["message"]
    assert session.close(Outcome.ENDED).forest.pieces == []
