"""New weights in a real SGLang server, by each way they can travel, against the Hugging Face model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import (
    SGLANG_KEY,
    TOLERANCE,
    EngineClient,
    TinyModel,
    assert_exact,
    collect,
    joined,
    log_p,
    prompt,
    request,
)

from system.config import EngineConfig
from system.engine.protocol import Chunk, EngineError
from system.engine.weights import make
from system.engine.weights.base import Bucket
from system.engine.weights.sglang import SGLangTransport
from system.engine.weights.tensor import SharedTensors

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(400)]
WAYS = ("disk", "tensor", "distributed")
SETTINGS: dict[str, Any] = {"name": "sglang", "device": "cpu", "max_running": 64, "max_context": 256}
_versions = count(1)  # of the one server of this session


@pytest.fixture
def old(tiny: Callable[..., TinyModel]) -> TinyModel:
    return tiny("qwen3", False)


@pytest.fixture
def new(tiny: Callable[..., TinyModel]) -> TinyModel:
    return tiny("qwen3", False, 1)


@pytest.fixture
async def connect(sglang_url: str, old: TinyModel, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """``await connect(way)``: (client, version) of the server, which now serves ``old`` as ``version``."""
    clients: list[EngineClient] = []

    async def start(way: str) -> tuple[EngineClient, int]:
        engine = EngineConfig(**SETTINGS, weights=way, weights_dir=str(tmp_path / "weights"))
        transport = make(engine, [sglang_url], old.path, "float32")
        client = EngineClient([sglang_url], transport=transport, deadline_s=120, key=SGLANG_KEY)
        clients.append(client)
        version = next(_versions)
        await client.push_weights([old.weights()], version)
        return client, version

    yield start
    for client in clients:
        await client.close()


def in_buckets(model: TinyModel, number: int = 3) -> list[Bucket]:
    weights = model.weights()
    return [{name: weights[name] for name in list(weights)[i::number]} for i in range(number)]


class Running:
    """A request that is being generated."""

    def __init__(self, client: EngineClient, rid: str, ids: np.ndarray, new_tokens: int) -> None:
        self.ids, self.chunks = ids, list[Chunk]()
        self.task = asyncio.create_task(self._run(client, rid, new_tokens))

    async def _run(self, client: EngineClient, rid: str, new_tokens: int) -> Chunk:
        async for chunk in client.generate(request(rid, self.ids, new_tokens)):
            self.chunks.append(chunk)
        return joined(self.chunks)

    @property
    def count(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)


async def produced(running: list[Running], tokens: int) -> None:
    async with asyncio.timeout(60):
        while sum(one.count for one in running) < tokens:  # noqa: ASYNC110 (a server's progress)
            await asyncio.sleep(0.005)


def assert_of_its_version(ids: np.ndarray, out: Chunk, models: Mapping[int, TinyModel]) -> set[int]:
    """Every token's log-probability is its stamped version's, given everything before it; the versions."""
    stamped = out.version.tolist()
    assert stamped == sorted(stamped)
    assert set(stamped) <= set(models)
    for version, model in models.items():
        mine = out.version == version
        picked = log_p(model, ids, out.tokens).gather(
            1, torch.from_numpy(out.tokens.astype(np.int64))[:, None]
        )
        np.testing.assert_allclose(out.logprob[mine], picked[:, 0].numpy()[mine], atol=TOLERANCE, rtol=0)
    return set(stamped)


@pytest.mark.parametrize("way", WAYS)
async def test_running_requests_go_over_to_the_new_weights(
    connect: Callable[..., Any], old: TinyModel, new: TinyModel, way: str
) -> None:
    """Old weights before, new ones after, each token under those of its stamp: with 64 requests in flight."""
    client, before = await connect(way)
    assert_exact(old, prompt(9), joined(await collect(client, request(f"{way}-before", prompt(9)))))
    running = [Running(client, f"{way}-{i}", prompt(20 + i % 7, i), 40 + i) for i in range(64)]
    await produced(running, 1200)
    after = next(_versions)
    report = await client.push_weights(in_buckets(new), after)
    versions = [assert_of_its_version(one.ids, await one.task, {before: old, after: new}) for one in running]
    assert sum(len(spanned) == 2 for spanned in versions) > 20, "the update must have come in the middle"
    assert [len((await one.task).tokens) for one in running] == [40 + i for i in range(64)]
    assert_exact(new, prompt(9), joined(await collect(client, request(f"{way}-after", prompt(9)))))
    assert (await client.infos())[0].weight_version == after
    assert report.bytes == sum(t.numel() * 4 for t in new.weights().values())
    assert 0 < report.pause_s[client.urls[0]] < 20
    print(f"\n{way}: paused {1e3 * report.pause_s[client.urls[0]]:.0f} ms, staged {report.stage_s:.3f} s")


@pytest.mark.parametrize("way", WAYS)
async def test_what_does_not_fit_is_not_sent(connect: Callable[..., Any], old: TinyModel, way: str) -> None:
    """A tensor of the wrong shape would kill the server, one of the wrong dtype be rounded unnoticed."""
    client, version = await connect(way)
    good = old.weights()
    bad = {
        "model.norm.weight: shape": {**good, "model.norm.weight": torch.zeros(7)},
        "lm_head.weight: dtype": {**good, "lm_head.weight": good["lm_head.weight"].half()},
        "model.layers.9.x: no such": {**good, "model.layers.9.x": torch.zeros(2)},
        "model.norm.weight: missing": {k: v for k, v in good.items() if k != "model.norm.weight"},
    }
    for message, tensors in bad.items():
        with pytest.raises(EngineError, match=message):
            await client.push_weights([{k: v} for k, v in tensors.items()], next(_versions))
    assert (await client.infos())[0].weight_version == version
    assert_exact(old, prompt(9), joined(await collect(client, request(f"{way}-still", prompt(9)))))


class Corrupting(SharedTensors):
    """Changes one number of one tensor on the way."""

    def stage(self, bucket: Bucket) -> None:
        changed = {name: tensor.clone() for name, tensor in bucket.items()}
        for name, tensor in changed.items():
            if name.endswith("layers.1.self_attn.k_proj.weight"):
                tensor[3, 5] += 1e-6
        super().stage(changed)


async def test_a_server_that_holds_something_else_stays_paused(
    connect: Callable[..., Any], old: TinyModel, new: TinyModel
) -> None:
    client, version = await connect("tensor")
    late = None
    corrupting = SGLangTransport(Corrupting(), old.path, "float32")
    broken = EngineClient(client.urls, transport=corrupting, key=SGLANG_KEY)
    try:
        with pytest.raises(EngineError, match=r"layers\.1\.self_attn\.qkv_proj\.weight has checksum"):
            await broken.push_weights([new.weights()], next(_versions))
        assert (await client.infos())[0].weight_version == version, "no token may carry the new one"
        late = asyncio.create_task(collect(client, request("late", prompt(9))))
        await asyncio.sleep(0.3)
        assert not late.done()
    finally:
        after = next(_versions)
        await client.push_weights([new.weights()], after)  # the same server takes the next push
        await broken.close()
    assert late is not None
    out = joined(await late)
    assert set(out.version.tolist()) == {after}
    assert_exact(new, prompt(9), out)


async def test_keep_never_serves_old_keys_as_new(
    connect: Callable[..., Any], old: TinyModel, new: TinyModel
) -> None:
    """Running requests keep their keys and values; nobody else ever gets those of another version."""
    client, before = await connect("tensor")
    ids = prompt(40, 11)
    await collect(client, request("keep-old", ids, 5))  # leaves a cached prefix
    cached = joined(await collect(client, request("keep-hit", ids, 5)))
    assert cached.cached_tokens > 30, "the cache must work for this test to mean anything"
    running = Running(client, "keep-running", ids, 150)
    await produced([running], 20)
    after = next(_versions)
    await client.push_weights([new.weights()], after, kv="keep")
    fresh = joined(await collect(client, request("keep-fresh", ids, 30)))
    assert fresh.cached_tokens == 0
    assert_exact(new, ids, fresh)
    out = await running.task
    old_tokens = int((out.version == before).sum())
    assert 0 < old_tokens < 150
    assert out.version.tolist() == [before] * old_tokens + [after] * (150 - old_tokens)
    straddled = np.concatenate([ids, out.tokens[:60]])  # computed under both by `running`
    child = joined(await collect(client, request("keep-child", straddled, 10)))
    assert child.cached_tokens <= len(ids) + 30  # from `fresh` at most
    assert_exact(new, straddled, child)
