"""The embedded engine with adapters: PEFT's numbers, several versions at a time, and what an update sends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import (
    EngineClient,
    Served,
    TinyModel,
    assert_exact,
    collect,
    joined,
    prompt,
    request,
)
from test_embedded import until

from system.engine.checksum import weights_checksum
from system.engine.embedded.scheduler import MOST_ADAPTERS
from system.engine.protocol import EngineError
from system.engine.weights.http import SafetensorsHttp
from system.models.adapter import Adapter
from system.models.shape import ModelShape

KIND = Adapter(3, 6.0, ("q", "k", "v", "out", "gate", "up", "down"))


def adapters(model: TinyModel, seed: int, kind: Adapter = KIND) -> dict[str, torch.Tensor]:
    """Random ones, large enough to change what is said."""
    generator = torch.Generator().manual_seed(seed)
    sizes = kind.tensors(ModelShape.from_directory(model.path))
    return {name: 0.3 * torch.randn(size, generator=generator) for name, size in sizes.items()}


def adapted(model: TinyModel, given: dict[str, torch.Tensor], kind: Adapter = KIND) -> TinyModel:
    """The model by PEFT with these adapters."""
    import copy

    from peft import LoraConfig, get_peft_model

    modules = sorted({name.split(".lora_")[0].rsplit(".", 1)[1] for name in given})
    config = LoraConfig(r=kind.rank, lora_alpha=kind.alpha, target_modules=modules, task_type="CAUSAL_LM")
    peft = get_peft_model(copy.deepcopy(model.hf), config)
    own = {name.replace(".default", ""): one for name, one in peft.named_parameters() if one.requires_grad}
    assert own.keys() == given.keys()
    with torch.no_grad():
        for name, one in own.items():
            one.copy_(given[name])
    return replace(model, hf=peft.eval())


def with_adapters(served: Served, kind: Adapter = KIND) -> EngineClient:
    served.client.transport = SafetensorsHttp(kind)
    return served.client


@pytest.mark.parametrize(
    ("family", "tied", "parts"),
    [
        ("qwen3", True, KIND.parts),
        ("qwen2", False, ("q", "v")),
        ("llama", True, ("k", "down")),
        ("mistral", False, ("out", "up")),
        ("qwen3_moe", True, ("q", "k", "v", "out")),
    ],
)
async def test_numbers_equal_peft(
    serve: Callable[..., Any], family: str, tied: bool, parts: tuple[str, ...]
) -> None:
    served, kind = await serve(family, tied), replace(KIND, parts=parts)
    given = adapters(served.model, 1, kind)
    names = list(given)
    client = with_adapters(served, kind)
    report = await client.push_weights([{name: given[name] for name in names[i::2]} for i in range(2)], 1)
    assert report.bytes == sum(4 * tensor.numel() for tensor in given.values())
    assert await served.checksum() == (1, weights_checksum(given.items()))
    expected = adapted(served.model, given, kind)
    prompts = [prompt(40), prompt(40), prompt(7, 1), prompt(60, 2)]
    outs = await asyncio.gather(
        *(collect(client, request(f"r{i}", ids, 10 + 5 * i)) for i, ids in enumerate(prompts))
    )
    for ids, chunks in zip(prompts, outs, strict=True):
        out = joined(chunks)
        assert (out.version == 1).all()
        assert_exact(expected, ids, out)


async def test_a_turn_ends_with_the_adapters_that_it_began_with(serve: Callable[..., Any]) -> None:
    """Three versions at one time, the model's own among them; what begins later has the newest."""
    served: Served = await serve("qwen3", True)
    client, given = with_adapters(served), {version: adapters(served.model, version) for version in (5, 6)}
    models = {0: served.model} | {v: adapted(served.model, one) for v, one in given.items()}
    prompts = [prompt(20 + i, i) for i in range(6)]
    served.pace.pass_s = 0.01
    tasks: list[tuple[int, np.ndarray, Any]] = []

    def begin(version: int, count: int) -> None:
        for ids in prompts[:count]:
            name = f"v{version}-{len(tasks)}"
            tasks.append((version, ids, asyncio.create_task(collect(client, request(name, ids, 120)))))

    begin(0, 4)
    await until(served, lambda info: info.counters["generated_tokens"] >= 40)
    await client.push_weights([given[5]], 5)
    begin(5, 6)
    await until(served, lambda info: info.running == 10)
    recomputed = (await client.infos())[0].counters["recomputed_sequences"]
    await client.push_weights([given[6]], 6, kv="keep")
    begin(6, 6)
    await until(served, lambda info: info.running == 16)
    assert served.engine._scheduler.adapters.versions == [5, 6]
    served.pace.pass_s = 0.0
    for version, ids, task in tasks:
        out = joined(await task)
        assert out.version.tolist() == [version] * 120
        assert_exact(models[version], ids, out)
    assert (await client.infos())[0].counters["recomputed_sequences"] == recomputed == 0
    child = np.concatenate([prompts[0], joined(await collect(client, request("w", prompts[0], 9))).tokens])
    after = joined(await collect(client, request("after", child)))
    assert after.cached_tokens >= len(prompts[0])  # of its own version
    assert_exact(models[6], child, after)
    assert served.engine._scheduler.adapters.versions == [6]


async def test_too_many_versions_at_once_and_the_oldest_goes_over(serve: Callable[..., Any]) -> None:
    served: Served = await serve("qwen3", True)
    client, ids = with_adapters(served), prompt(20)
    given = {version: adapters(served.model, version) for version in range(1, MOST_ADAPTERS + 2)}
    served.pace.pass_s = 0.02
    tasks = []
    for version, one in given.items():
        await client.push_weights([one], version)
        tasks.append(asyncio.create_task(collect(client, request(f"v{version}", ids, 100))))
        await until(served, lambda info, version=version: info.running == version)
    served.pace.pass_s = 0.0
    outs = [joined(await task) for task in tasks]
    first = outs[0].version.tolist()
    old = first.count(1)
    assert 0 < old < 100
    assert first == [1] * old + [MOST_ADAPTERS + 1] * (100 - old)
    begun, newest = (adapted(served.model, given[v]) for v in (1, MOST_ADAPTERS + 1))
    assert_exact(begun, ids, cut(outs[0], 0, old))
    assert_exact(newest, np.concatenate([ids, outs[0].tokens[:old]]), cut(outs[0], old, 100))
    for version, out in zip([*given][1:], outs[1:], strict=True):
        assert out.version.tolist() == [version] * 100
        assert_exact(adapted(served.model, given[version]), ids, out)


def cut(out: Any, begin: int, end: int) -> Any:
    names = ("tokens", "logprob", "entropy", "version")
    return replace(out, **{name: getattr(out, name)[begin:end] for name in names})


async def test_a_long_prompt_is_computed_with_its_adapters(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    served: Served = await serve("qwen3", True)
    monkeypatch.setattr(served.engine._scheduler, "_max_prefill", 16)
    client, given, ids = with_adapters(served), adapters(served.model, 1), prompt(70)
    await client.push_weights([given], 1)
    assert_exact(adapted(served.model, given), ids, joined(await collect(client, request("a", ids, 10))))


async def test_a_wrong_update_of_adapters_changes_nothing(serve: Callable[..., Any]) -> None:
    served: Served = await serve("qwen3", True)
    client, good = with_adapters(served), adapters(served.model, 1)
    await client.push_weights([good], 1)
    before, name = await served.checksum(), next(iter(good))
    bad: dict[str, dict[str, torch.Tensor]] = {
        f"{name}: shape": {**good, name: torch.zeros(3, 3)},
        f"{name}: dtype": {**good, name: good[name].half()},
        f"{name}: missing from the update": {key: one for key, one in good.items() if key != name},
        "model.norm.weight: no such tensor": {**good, "model.norm.weight": torch.zeros(48)},
    }
    for says, tensors in bad.items():
        with pytest.raises(EngineError, match=says):
            await client.push_weights([tensors], 2)
        assert await served.checksum() == before
    client.transport = SafetensorsHttp(replace(KIND, rank=4))
    with pytest.raises(EngineError, match="start it anew"):
        await client.push_weights([adapters(served.model, 2, replace(KIND, rank=4))], 2)
    with pytest.raises(EngineError, match="adapter: expected a rank"):
        await client.post("/begin_weight_update", adapter={"rank": 0, "alpha": 1.0, "parts": ["q"]})
    with pytest.raises(EngineError, match="adapter: expected a rank"):
        await client.post("/begin_weight_update", adapter={"rank": 1, "alpha": 1.0, "parts": ["x"]})
    assert await served.checksum() == before


async def test_all_weights_take_the_place_of_adapters(
    serve: Callable[..., Any], tiny: Callable[..., TinyModel]
) -> None:
    served: Served = await serve("qwen3", True)
    client, new, ids = with_adapters(served), tiny("qwen3", True, 1), prompt(12)
    await client.push_weights([adapters(served.model, 1)], 1)
    client.transport = SafetensorsHttp()
    await client.push_weights([new.weights()], 2)
    assert_exact(new, ids, joined(await collect(client, request("a", ids))))
