"""Models and servers for the engine tests."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from engine_models import SGLANG_KEY, EngineClient, Paced, Served, TinyModel, make_model

from system.config import EngineConfig, LoraConfig
from system.engine.embedded import EmbeddedEngine
from system.engine.routes import RouteFormat
from system.engine.sglang.command import SglangMissing, interpreter, server_command
from system.engine.sglang.server import SglangServer
from system.models.shape import ModelShape
from system.serving import free_port as a_free_port

sys.path.append(str(Path(__file__).parent.parent / "rollout"))  # the fakes of the rollouts serve here, too
sys.path.append(str(Path(__file__).parent.parent / "agents"))  # and the clients of the endpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """``tiny(family, tied, seed, rope)``: made once per session."""
    made: dict[tuple[str, bool, int, str], TinyModel] = {}

    def get(family: str = "qwen3", tied: bool = True, seed: int = 0, rope: str = "default") -> TinyModel:
        key = (family, tied, seed, rope)
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp("model"), *key)
        return made[key]

    return get


@pytest.fixture
async def serve(tiny: Callable[..., TinyModel]) -> AsyncIterator[Callable[..., Any]]:
    """``await serve(family, tied, rope, **engine_config)``: a server that ends with the test.

    ``pass_s``: seconds that a step of it takes at least.
    """
    running: list[Served] = []

    async def start(
        family: str = "qwen3", tied: bool = True, rope: str = "default", pass_s: float = 0.0, **settings: Any
    ) -> Served:
        model = tiny(family, tied, rope=rope)
        defaults: dict[str, Any] = {"device": "cpu", "max_running": 32, "max_context": 256, "cache_slots": 32}
        engine = EmbeddedEngine(EngineConfig(**{**defaults, **settings}), model.path, seed=0)
        pace = Paced(engine, pass_s)
        url = await engine.start()
        running.append(Served(model, engine, EngineClient([url], deadline_s=60, stall_s=30), pace))
        return running[-1]

    yield start
    for served in running:
        await served.client.close()
        await served.engine.stop()


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A port nobody listens on now."""
    return a_free_port


@pytest.fixture(scope="session")
def start_sglang(
    tiny: Callable[..., TinyModel], tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[Callable[..., SglangServer]]:
    """``start_sglang(model, **environment)``: a real SGLang server on CPU of that model, or of
    ``tiny("qwen3", False)``, which may still be loading, and ends with the session.  ``lora``: for adapters.

    Skipped by name where SGLang is not installed, and failed there if ``ESPALIER_REQUIRE_SGLANG`` is set, as
    CI does.
    """
    engine = EngineConfig(name="sglang", device="cpu", max_running=32, max_context=512, cache_slots=32)
    running: list[SglangServer] = []

    def start(
        model: TinyModel | None = None, *, lora: LoraConfig | None = None, **environment: str
    ) -> SglangServer:
        try:
            python = interpreter(engine)
        except SglangMissing as error:
            missing = pytest.fail if os.environ.get("ESPALIER_REQUIRE_SGLANG") else pytest.skip
            missing(f"SGLang is not installed: {error}")
        port, log = free_port(), tmp_path_factory.mktemp("sglang") / "sglang.log"
        path = str((model or tiny("qwen3", False)).path)
        command = server_command(
            engine,
            python=python,
            model=path,
            routes=RouteFormat.of_directory(path) is not None,
            dtype="float32",
            port=port,
            cpu=True,
            key=SGLANG_KEY,
            lora=lora,
            experts=ModelShape.from_directory(path).experts is not None,
        )
        command.env.update(environment)
        running.append(SglangServer(command, f"http://127.0.0.1:{port}", log))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture(scope="session")
def sglang_url(start_sglang: Callable[..., SglangServer]) -> str:
    """A real SGLang server: one for the whole session.  Who needs certain weights in it loads them first."""
    return start_sglang().wait_ready(300)
