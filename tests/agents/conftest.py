"""An endpoint in front of an embedded engine, and what the engine has seen."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from agent_models import EngineBooks, ScriptedEngine, make_model, served

from system.agents.endpoint import AgentEndpoint
from system.config import EngineConfig
from system.engine.embedded import EmbeddedEngine, server
from system.engine.pool import EnginePool


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("talker"))


@dataclass
class Place:
    """A started endpoint."""

    endpoint: AgentEndpoint
    url: str
    books: EngineBooks

    async def open(self, seed: int = 0, **settings: Any) -> Any:
        settings.setdefault("deadline_s", 60)
        return await self.endpoint.open("p", seed, **settings)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def place(model_path: Path, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An endpoint in front of a real engine."""
    books = EngineBooks()
    told = server.answer

    def message(engine: Any, job: Any, event: Any) -> dict[str, Any]:
        books.see(job, event)
        return told(engine, job, event)

    monkeypatch.setattr(server, "answer", message)
    config = EngineConfig(device="cpu", max_running=64, max_context=4096, cache_slots=64)
    engine = EmbeddedEngine(config, model_path, seed=0)
    url = await engine.start()
    stack.push_async_callback(engine.stop)
    pool = EnginePool([url], deadline_s=60, stall_s=30)
    stack.push_async_callback(pool.close)
    endpoint = AgentEndpoint(served(pool))
    stack.push_async_callback(endpoint.stop)
    return Place(endpoint, await endpoint.start(), books)


@pytest.fixture
async def scripted(stack: AsyncExitStack) -> Callable[..., Awaitable[tuple[Place, ScriptedEngine]]]:
    """``await scripted(line, …)``: an endpoint in front of an engine that says just that."""

    async def start(
        *lines: str | Exception, endpoint: dict[str, Any] | None = None, **settings: Any
    ) -> tuple[Place, ScriptedEngine]:
        engine = ScriptedEngine(lines)
        there = AgentEndpoint(served(engine, engine.tokenizer, **settings), **(endpoint or {}))
        stack.push_async_callback(there.stop)
        return Place(there, await there.start(), EngineBooks()), engine

    return start
