"""Who may command a running engine: real attacks from another process, each answered as it must be."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import pytest
from engine_models import TinyModel

from system.config import EngineConfig
from system.engine.control import EngineControl, Http
from system.engine.embedded import EmbeddedEngine
from system.engine.pool import EnginePool
from system.engine.protocol import EngineError, GenerateRequest, Sampling

KEY = "0f" * 32
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
BYTES = {"Content-Type": "application/octet-stream"}
SHOWN = {"Authorization": f"Bearer {KEY}"}

# Sends one request and prints the status of the answer: arguments are URL, method, body, header=value …
ATTACKER = """
import sys, urllib.error, urllib.request
url, method, body, *headers = sys.argv[1:]
headers = dict(header.split("=", 1) for header in headers)
request = urllib.request.Request(url, body.encode() or None, headers, method=method)
try:
    print(urllib.request.urlopen(request, timeout=20).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


async def attack(url: str, method: str, body: str, headers: dict[str, str]) -> int:
    words = [f"{name}={value}" for name, value in headers.items()]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-c", ATTACKER, url, method, body, *words, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    return int(out)


@pytest.fixture
async def engine(tiny: Callable[..., TinyModel]) -> Any:
    made = EmbeddedEngine(EngineConfig(device="cpu", max_running=2, cache_slots=0), tiny().path)
    url = await made.start(key=KEY)
    yield made, url
    await made.stop()


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/pause_generation", "{}", JSON, 401),
        ("POST", "/begin_weight_update", "{}", JSON, 401),
        ("POST", "/update_weights_from_tensor", "x", BYTES, 401),
        ("POST", "/end_weight_update", '{"weight_version": "7"}', JSON, 401),
        ("POST", "/generate", '{"input_ids": [1]}', JSON, 401),
        ("GET", "/model_info", "", {}, 401),
        ("GET", "/v1/loads", "", {}, 401),
        ("GET", "/ready", "", {}, 401),
        ("POST", "/pause_generation", "{}", JSON | {"Authorization": "Bearer wrong"}, 401),
        ("POST", "/pause_generation", "{}", JSON | {"Authorization": f"Basic {KEY}"}, 401),
        ("POST", "/pause_generation", "mode=abort", FORM, 415),  # a page's form
        ("POST", "/pause_generation", '{"mode": "abort"}', {"Content-Type": "text/plain"}, 415),
        ("POST", "/pause_generation", "mode=abort", FORM | SHOWN, 415),
        ("POST", "/pause_generation", "{}", BYTES | SHOWN, 415),
        ("POST", "/pause_generation", "{}", JSON | SHOWN | {"Host": "rebound.example:80"}, 421),
        ("GET", "/health", "", {"Host": "rebound.example"}, 421),
        ("GET", "/health", "", {"Host": "127.0.0.1.rebound.example"}, 421),
        ("GET", "/health", "", {"Host": "rebound.example@127.0.0.1"}, 421),
        ("GET", "/health", "", {}, 200),
        (
            "GET",
            "/health",
            "",
            {"Authorization": "Bearer wrong"},
            401,
        ),  # learnt at the start
        ("GET", "/health", "", {"Host": "LocalHost:1"}, 200),
        ("GET", "/health", "", {"Host": "[::1]:1"}, 200),
        ("GET", "/model_info", "", SHOWN, 200),
    ],
)
async def test_what_another_process_may_do(
    engine: Any, method: str, path: str, body: str, headers: dict[str, str], status: int
) -> None:
    running, url = engine
    assert await attack(url + path, method, body, headers) == status
    assert not running.loop.paused
    assert running.version == 0


async def test_those_who_hold_the_key_work(engine: Any) -> None:
    running, url = engine
    pool = EnginePool([url], deadline_s=30, key=KEY)
    request = GenerateRequest("r", [1, 2, 3], Sampling(max_new_tokens=2, ignore_eos=True))
    try:
        chunks = [chunk async for chunk in pool.generate(request)]
    finally:
        await pool.close()
    assert sum(len(chunk.tokens) for chunk in chunks) == 2
    async with Http([url], KEY) as http:
        control = EngineControl(url, http)
        assert not (await control.info()).paused
        await control.post("/pause_generation", mode="retract")
        assert running.loop.paused
        await control.post("/continue_generation")


async def test_without_it_a_client_is_told_so(engine: Any) -> None:
    _, url = engine
    pool = EnginePool([url], deadline_s=30)
    try:
        with pytest.raises(EngineError, match="show this server's key"):
            [_ async for _ in pool.generate(GenerateRequest("r", [1], Sampling(max_new_tokens=1)))]
    finally:
        await pool.close()
    async with Http(["http://127.0.0.1:1"], KEY) as http:  # the key of another server stays with that
        with pytest.raises(EngineError, match="HTTP 401"):
            await EngineControl(url, http).info()
