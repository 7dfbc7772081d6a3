"""Connections that break anywhere, and clients that send again what was not answered, on a real engine."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import aiohttp
from test_chat_sdk import TOOLS

from system.tree.record import Kind, Outcome


async def answered(http: aiohttp.ClientSession, url: str, body: Any, rng: random.Random) -> tuple[Any, int]:
    """The answer's message, and how often the request was sent: most are cut off, at any moment."""
    for count in range(100):
        headers = {"x-stainless-retry-count": str(count)}
        patience = rng.choice([0.0, 0.002, 0.01, 0.03, 0.1]) if count < 4 else 20
        try:
            async with asyncio.timeout(patience), http.post(url, json=body, headers=headers) as answer:
                assert answer.status == 200
                if not body["stream"]:
                    return (await answer.json())["choices"][0]["message"], count + 1
                lines = (await answer.text()).split("\n\n")
                assert lines[-2] == "data: [DONE]"
                return joined(lines[:-2]), count + 1
        except (TimeoutError, aiohttp.ClientError):
            continue
    raise AssertionError("never answered")


def joined(lines: list[str]) -> dict[str, Any]:
    deltas = [
        json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
        for line in lines
        if not line.startswith(":")
    ]
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for delta in deltas:
        message["content"] += delta.get("content") or ""
        message.setdefault("tool_calls", []).extend(delta.get("tool_calls", []))
    return message


async def test_what_was_handed_out_is_recorded_once_whatever_breaks(place: Any) -> None:
    sent = 0

    async def one(seed: int) -> None:
        nonlocal sent
        rng = random.Random(seed)
        session = await place.open(seed)
        messages: list[Any] = [{"role": "user", "content": "What is it?"}]
        said: list[Any] = []
        async with aiohttp.ClientSession() as http:
            url = f"{session.openai_url}/chat/completions"
            for _ in range(4):
                body = {"model": "m", "messages": messages, "tools": TOOLS, "stream": rng.random() < 0.5}
                message, times = await answered(http, url, body, rng)
                sent += times
                said.append(message)
                calls = message.get("tool_calls") or []
                told = [{"role": "tool", "tool_call_id": call["id"], "content": "3"} for call in calls]
                messages = [*messages, message, *(told or [{"role": "user", "content": "And?"}])]
        episode = session.close(Outcome.ENDED)
        place.books.check(episode.forest)
        pieces = episode.forest.pieces
        assert episode.rewrites == 0
        (end,) = episode.chosen
        path = episode.forest.path(end)
        assert [pieces[i].kind for i in path] == [Kind.TOOL, Kind.MODEL] * len(said)
        assert all(pieces[i].trained for i in path if pieces[i].kind == Kind.MODEL)

    await asyncio.gather(*(one(seed) for seed in range(30)))
    assert sent > 30 * 4  # some were cut
