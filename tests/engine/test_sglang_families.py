"""SGLang computes what other families' models say, and holds what it is sent: proved by its own digests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from engine_models import (
    SGLANG_KEY,
    EngineClient,
    TinyModel,
    assert_exact,
    collect,
    joined,
    prompt,
    request,
)
from test_embedded_adapters import adapted, adapters
from test_routes import hf_routes, told

from system.config import LoraConfig
from system.engine.control import Http
from system.engine.routes import RouteFormat
from system.engine.sglang.server import SglangServer
from system.engine.weights.base import size
from system.engine.weights.distributed import Distributed, TorchGroup
from system.engine.weights.sglang import SGLangTransport
from system.engine.weights.sglang_adapters import SGLangAdapters
from system.models.adapter import Adapter

ATTENTION = Adapter(3, 6.0, ("q", "k", "v", "out"))  # the parts of a mixture that have adapters


async def takes_adapters(client: EngineClient, model: TinyModel) -> None:
    """The server of ``client`` holds ``model``, and computes with two versions of adapters as PEFT does."""
    client.transport = SGLangAdapters(ATTENTION, model.path, "float32")
    for version in (2, 3):
        given = adapters(model, version, ATTENTION)
        report = await client.push_weights([given], version)
        assert (report.bytes, report.failures, report.pause_s) == (size(given), {}, {})
        with_them, ids = adapted(model, given, ATTENTION), prompt(60, version)
        chunks = await collect(client, replace(request(f"v{version}", ids, 40), routes_from=7))
        out = joined(chunks)
        base = replace(with_them, hf=with_them.hf.get_base_model())  # PEFT has put its layers into it
        expected = hf_routes(base, np.concatenate([ids, out.tokens]))[7:-1]
        np.testing.assert_array_equal(np.sort(told(chunks), -1), expected)
        assert np.all(out.version == version)
        assert_exact(with_them, ids, out)


pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("family", "tied", "rope"),
    [
        ("llama", False, "llama3"),
        ("mistral", True, "linear"),
        ("qwen3", False, "yarn"),
        ("qwen3_moe", False, "default"),
    ],
)
async def test_a_family_is_served_and_takes_new_weights(
    start_sglang: Callable[..., SglangServer],
    tiny: Callable[..., TinyModel],
    family: str,
    tied: bool,
    rope: str,
) -> None:
    old, new = (tiny(family, tied, seed, rope) for seed in (0, 1))
    mixture = family == "qwen3_moe"  # it takes adapters, too
    server = start_sglang(old, lora=LoraConfig(rank=ATTENTION.rank) if mixture else None)
    url = await asyncio.to_thread(server.wait_ready, 400.0)
    known = RouteFormat.of_directory(old.path)
    client = EngineClient([url], deadline_s=120, key=SGLANG_KEY, routes=known)
    transport = SGLangTransport(Distributed("127.0.0.1", TorchGroup), old.path, "float32")
    try:
        for version, model in enumerate((old, new)):
            if version:
                async with Http([url], SGLANG_KEY) as http:
                    report = await transport.push(http, [url], [model.weights()], version, "recompute")
                assert not report.failures
            ids = prompt(60, version)
            first = 7 if known else None
            chunks = await collect(client, replace(request(f"v{version}", ids, 40), routes_from=first))
            out = joined(chunks)
            if known:
                expected = hf_routes(model, np.concatenate([ids, out.tokens]))[first:-1]
                np.testing.assert_array_equal(np.sort(told(chunks), -1), expected)
            assert np.all(out.version == version)
            assert_exact(model, ids, out)
        if mixture:
            await takes_adapters(client, new)
    finally:
        await client.close()
        server.stop()
