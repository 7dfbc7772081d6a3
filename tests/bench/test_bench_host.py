"""The stub engine speaks the protocol, and the rollout host can be measured against it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from system.bench.host import Load, make_plan, measure, stub
from system.engine.pool import EnginePool
from system.engine.protocol import GenerateRequest, Sampling

LOAD = Load(24, 16, 4000.0, warm_s=1.0, measured_s=4.0, tool_s=0.02, leaves=8, roots=4)


async def test_the_client_reads_from_the_stub_what_its_plan_says() -> None:
    plan = make_plan(LOAD)
    async with stub(plan) as (url, _):
        client = EnginePool([url])
        try:
            for seed in (3, 64 + 5):  # the second segment over the first one's connection
                request = GenerateRequest(f"r{seed}", np.arange(9, dtype=np.int32), Sampling(500, seed=seed))
                async with asyncio.timeout(60):
                    chunks = [chunk async for chunk in client.generate(request)]
                tokens = np.concatenate([chunk.tokens for chunk in chunks])
                assert tokens.tolist() == plan.segments[seed % 64]
                assert {chunk.tokens.size for chunk in chunks[:-1]} == {16}
                assert all(
                    np.isfinite(chunk.entropy).all() and (chunk.version == 1).all() for chunk in chunks
                )
                finish = chunks[-1].finish
                assert finish is not None
                assert finish.type == "stop"
                assert finish.matched == (plan.matched[seed % 64] or plan.segments[seed % 64][-1])
        finally:
            await client.close()


async def test_a_small_load_is_carried_and_accounted_for() -> None:
    figures = await measure(LOAD)
    assert figures["segments"] > 20
    assert figures["calls"] > 0
    assert figures["trees"] > 0
    assert figures["forks"] > 0
    assert figures["tokens"] == pytest.approx(figures["chunks"] * 16, rel=0.2)
    assert 16 <= figures["alive_max"] <= 32
    assert 0 < figures["cpu_us_per_chunk"] == pytest.approx(figures["cpu_s"] / figures["chunks"] * 1e6)
