"""An agent written with a framework, OpenAI's Agents SDK, unchanged: handing it a base URL trains it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    function_tool,
)
from agents.exceptions import MaxTurnsExceeded, ModelBehaviorError
from test_chat_sdk import client

from system.tree.record import Kind, Outcome


@function_tool
def add(a: int, b: int) -> str:
    """The sum of two numbers."""
    return str(a + b)


@function_tool
def look(word: str) -> str:
    """What a word means."""
    return f"{word} is a letter"


KINDS: dict[str, Any] = {"chat": OpenAIChatCompletionsModel, "responses": OpenAIResponsesModel}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_agent_of_a_framework_is_recorded_exactly(place: Any, kind: str, stream: bool) -> None:
    async def one(seed: int) -> int:
        session = await place.open(seed)
        async with client(session) as sdk:
            model = KINDS[kind](model="gpt-any", openai_client=sdk)
            agent = Agent(
                name="counter",
                instructions="Use the tools.",
                tools=[add, look],
                model=model,
                model_settings=ModelSettings(temperature=0.1),
            )
            quiet = RunConfig(tracing_disabled=True)
            try:
                if stream:
                    running = Runner.run_streamed(agent, "What is it?", max_turns=6, run_config=quiet)
                    async for _ in running.stream_events():
                        pass
                else:
                    await Runner.run(agent, "What is it?", max_turns=6, run_config=quiet)
            except (MaxTurnsExceeded, ModelBehaviorError):
                pass
        episode = session.close(Outcome.ENDED)
        (end,) = episode.chosen
        path = [episode.forest.pieces[i] for i in episode.forest.path(end)]
        turns = len(path) // 2
        assert (episode.rewrites, episode.retries) == (0, 0)
        assert [piece.kind for piece in path] == [Kind.TOOL, Kind.MODEL] * turns
        assert all(piece.trained for piece in path[1::2])
        assert place.books.check(episode.forest) == turns
        assert {call.text for call in episode.calls} <= {"3", "ü is a letter"}
        return turns

    turns = await asyncio.gather(*(one(seed) for seed in range(10)))
    assert sum(turns) == len(place.books)
    assert max(turns) > 2
