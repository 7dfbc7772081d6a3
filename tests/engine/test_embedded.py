"""What the embedded engine does beyond the contract of every engine (`contract/`), over real HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import (
    EOS,
    TOLERANCE,
    VOCAB,
    EngineClient,
    Served,
    TinyModel,
    assert_exact,
    collect,
    joined,
    log_p,
    make_model,
    prompt,
    request,
)
from family_models import NAMES, VARIANTS, documented, register
from transformers import AutoModelForCausalLM, GenerationConfig

from system.config import EngineConfig
from system.engine.embedded import EmbeddedEngine
from system.engine.protocol import Chunk, EngineError, EngineInfo, GenerateRequest, Sampling
from system.models.families import FAMILIES


async def until(served: Served, reached: Callable[[EngineInfo], bool]) -> None:
    """Poll the server until it says so."""
    async with asyncio.timeout(60):
        while not reached((await served.client.infos())[0]):  # noqa: ASYNC110 (a server's state, not an event)
            await asyncio.sleep(0.002)


@pytest.fixture(params=VARIANTS, ids=NAMES)
async def served(request: pytest.FixtureRequest, serve: Callable[..., Any]) -> Served:
    return await serve(*request.param)


@pytest.fixture
async def one(serve: Callable[..., Any]) -> Served:
    """One variant, for what does not depend on the model."""
    return await serve("qwen3", True)


# Numbers ----------------------------------------------------------------------------------------


async def test_numbers_equal_hugging_face(served: Served) -> None:
    """Log-probabilities and entropies, alone and in a mixed batch, with and without a shared prefix."""
    base = prompt(40)
    prompts = [
        base[:1],
        base[:7],
        base,
        base,
        np.concatenate([base[:25], prompt(9, 1)]),
        prompt(60, 2),
        prompt(3, 3),
    ]
    temperatures = [1.0, 0.6, 1.0, 1.4, 1.0, 0.8, 1.0]
    outs = await asyncio.gather(
        *(
            collect(served.client, request(str(i), ids, 12 + 5 * i, temperature=t))
            for i, (ids, t) in enumerate(zip(prompts, temperatures, strict=True))
        )
    )
    for ids, temperature, chunks in zip(prompts, temperatures, outs, strict=True):
        assert_exact(served.model, ids, joined(chunks), temperature)
    again = joined(await collect(served.client, request("again", base)))
    assert again.cached_tokens == len(base) - 1
    assert_exact(served.model, base, again)


async def test_greedy_equals_hugging_face_generate(served: Served) -> None:
    for seed, length in enumerate((5, 30)):
        ids = prompt(length, seed)
        out = joined(
            await collect(served.client, request(f"g{seed}", ids, 30, temperature=0.0, ignore_eos=False))
        )
        settings = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=EOS, pad_token_id=EOS)
        expected = served.model.hf.generate(torch.from_numpy(ids.astype(np.int64))[None], settings)
        assert out.tokens.tolist() == expected[0, length:].tolist()
        assert_exact(served.model, ids, out)


async def test_samples_follow_the_distribution(one: Served) -> None:
    """First tokens of many seeds against the model's probabilities (a χ² test at p < 1e-6)."""
    ids, draws = prompt(12), 600
    outs = await asyncio.gather(
        *(collect(one.client, request(f"d{i}", ids, 1, seed=i)) for i in range(draws))
    )
    counts = np.bincount([int(c[0].tokens[0]) for c in outs], minlength=VOCAB)
    p = log_p(one.model, ids, np.zeros(1, np.int32))[0].exp().numpy().astype(np.float64)
    big = p * draws >= 5
    observed = np.append(counts[big], counts[~big].sum())
    expected = np.append(p[big], p[~big].sum()) * draws
    chi2, freedom = ((observed - expected) ** 2 / expected).sum(), len(observed) - 1
    assert chi2 < freedom + 6 * np.sqrt(2 * freedom) + 12


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
async def test_a_seed_gives_the_same_tokens_in_any_company(serve: Callable[..., Any], family: str) -> None:
    one, ids = await serve(family), prompt(15)
    alone = joined(await collect(one.client, request("alone", ids, 40, seed=7)))
    crowd = [request(f"c{i}", prompt(5 + i, i), 10 + i) for i in range(20)]
    outs = await asyncio.gather(
        *(
            collect(one.client, r)
            for r in [*crowd, request("amid", ids, 40, seed=7), request("o", ids, 40, seed=8)]
        )
    )
    assert joined(outs[-2]).tokens.tolist() == alone.tokens.tolist()
    assert joined(outs[-1]).tokens.tolist() != alone.tokens.tolist()


@pytest.mark.parametrize(("family", "tied", "rope"), VARIANTS, ids=NAMES)
async def test_bfloat16_follows_its_hugging_face_twin(
    tiny: Callable[..., TinyModel], family: str, tied: bool, rope: str
) -> None:
    """Rounds wherever the model in bfloat16 rounds when it decodes with a cache, as the engine does."""
    model = tiny(family, tied, rope=rope)
    engine = EmbeddedEngine(
        EngineConfig(device="cpu", max_running=4, cache_slots=4), model.path, dtype="bfloat16"
    )
    client, ids = EngineClient([await engine.start()]), prompt(30)
    out = joined(await collect(client, request("b", ids, 40, seed=0)))
    half = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.bfloat16).eval()
    twin, tokens, cache = [], torch.from_numpy(ids.astype(np.int64))[None], None
    with torch.no_grad():
        for token in out.tokens.tolist():
            step = half(tokens, past_key_values=cache, use_cache=True)
            cache, tokens = step.past_key_values, torch.tensor([[token]])
            twin.append(step.logits[0, -1].float().log_softmax(-1)[token].item())
    full = log_p(model, ids, out.tokens).numpy()[np.arange(40), out.tokens]
    engine_off, full_off = np.abs(out.logprob - twin).mean(), np.abs(full - twin).mean()
    assert engine_off < 0.1 * full_off, "float32 is ten times as far away"
    await client.close()
    await engine.stop()


async def test_a_family_is_added_as_the_documentation_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the engine; the learner's part is in tests/learn/test_families.py."""
    monkeypatch.setitem(FAMILIES, "seed_oss", FAMILIES["qwen3"])  # so that it is gone again afterwards
    register(documented())
    model = make_model(tmp_path, "seed_oss", False, 0, "yarn")
    engine = EmbeddedEngine(EngineConfig(device="cpu", max_running=4, cache_slots=4), model.path)
    client, ids = EngineClient([await engine.start()]), prompt(30)
    assert_exact(model, ids, joined(await collect(client, request("new", ids, 40))))
    await client.close()
    await engine.stop()


# Endings ----------------------------------------------------------------------------------------


async def test_idle_time_is_told_while_it_passes(one: Served) -> None:
    """Not when the wait ends: then a short window would get seconds from before it."""
    began = time.monotonic()
    (first,) = await one.client.infos()
    await asyncio.sleep(0.3)
    (second,) = await one.client.infos()
    passed = second.counters["idle_waiting_s"] - first.counters["idle_waiting_s"]
    assert 0.2 < passed < time.monotonic() - began + 0.1


async def test_closing_the_iterator_aborts_on_the_server(one: Served) -> None:
    one.pace.pass_s = 0.01
    chunks = one.client.generate(request("a", prompt(5), 250))
    await anext(chunks)
    await chunks.aclose()
    await until(one, lambda info: not info.running)
    assert (await one.client.infos())[0].counters["generated_tokens"] < 250


# Sharing ----------------------------------------------------------------------------------------


async def test_a_fork_shares_the_prefix_of_its_running_parent(one: Served) -> None:
    """The child starts while the parent generates on, and computes nothing of what the parent has
    computed.
    """
    ids, prefix, children = prompt(30), prompt(0), []
    parent: list[Chunk] = []
    async for chunk in one.client.generate(request("parent", ids, 150)):
        parent.append(chunk)
        if len(parent) == 3:
            prefix = np.concatenate([ids, joined(parent).tokens])
            children = [
                asyncio.create_task(collect(one.client, request(f"c{i}", prefix, 20))) for i in range(3)
            ]
    for task in children:
        out = joined(await task)
        assert out.cached_tokens == len(prefix) - 1
        assert_exact(one.model, prefix, out)
    assert_exact(one.model, ids, joined(parent))


async def test_roots_of_one_prompt_compute_it_once(one: Served) -> None:
    ids = prompt(50)
    outs = await asyncio.gather(*(collect(one.client, request(f"r{i}", ids, 10)) for i in range(8)))
    assert sorted(joined(chunks).cached_tokens for chunks in outs) == [0] + [49] * 7
    counters = (await one.client.infos())[0].counters
    assert counters["prefill_tokens"] == 50 + 7


async def test_a_finished_branch_resumes_from_its_cache(one: Served) -> None:
    ids = prompt(20)
    first = joined(await collect(one.client, request("a", ids, 30)))
    tool = prompt(8, 9)
    longer = np.concatenate([ids, first.tokens, tool])
    out = joined(await collect(one.client, request("b", longer, 30)))
    assert out.cached_tokens == len(ids) + len(first.tokens) - 1  # the last token's key was never needed
    assert_exact(one.model, longer, out)


async def test_caches_evict_the_least_recently_used(serve: Callable[..., Any]) -> None:
    served = await serve("qwen3", True, cache_slots=2)
    prompts = [prompt(20, seed) for seed in range(3)]
    for i, ids in enumerate([*prompts, prompts[2], prompts[1], prompts[0]]):
        out = joined(await collect(served.client, request(str(i), ids, 4, temperature=0.0)))
        assert out.cached_tokens == (19 if i in (3, 4) else 0)
        assert_exact(served.model, ids, out)


# Pause, versions, updates --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_pause_stops_and_continue_goes_on(one: Served, mode: Any) -> None:
    ids = prompt(10)
    one.pace.pass_s = 0.01
    task = asyncio.create_task(collect(one.client, request("a", ids, 200)))
    await until(one, lambda info: info.counters["generated_tokens"] > 0)
    await one.client.pause(mode)
    one.pace.pass_s = 0.0
    before = (await one.client.infos())[0]
    assert before.paused
    late = asyncio.create_task(collect(one.client, request("late", ids, 5)))
    await asyncio.sleep(0.1)
    assert not await one.client.healthy("/ready")
    assert await one.client.healthy()
    after = (await one.client.infos())[0]
    assert after.counters["generated_tokens"] == before.counters["generated_tokens"] < 200
    await one.client.resume()
    assert_exact(one.model, ids, joined(await task))
    assert len(joined(await late).tokens) == 5
    assert await one.client.healthy("/ready")


async def test_one_that_begins_paused_generates_nothing_before_it_is_told(
    tiny: Callable[..., TinyModel],
) -> None:
    """As an engine actor that Ray has restarted: it knows only the first weights."""
    engine = EmbeddedEngine(EngineConfig(device="cpu", max_running=2, cache_slots=0), tiny().path)
    engine.loop.paused = True
    client = EngineClient([await engine.start()], deadline_s=30)
    waiting = asyncio.create_task(collect(client, request("a", prompt(5), 3)))
    await asyncio.sleep(0.3)
    assert (await client.infos())[0].paused
    assert not waiting.done()
    await client.resume()
    assert len(joined(await waiting).tokens) == 3
    await client.close()
    await engine.stop()


@pytest.mark.parametrize("paused", [False, True])
async def test_update_in_flight_recomputes(
    served: Served, tiny: Callable[..., TinyModel], paused: bool
) -> None:
    """Every token equals the model whose version it carries, given everything before it."""
    family, tied = served.model.hf.config.model_type, served.model.hf.config.tie_word_embeddings
    rope = served.model.hf.config.rope_parameters["rope_type"]
    new = tiny(family, tied, 1, rope)
    prompts = [prompt(20 + i, i) for i in range(6)]
    served.pace.pass_s = 0.02
    tasks = [
        asyncio.create_task(collect(served.client, request(f"u{i}", p, 150))) for i, p in enumerate(prompts)
    ]
    await until(served, lambda info: info.counters["generated_tokens"] >= 100)
    if paused:
        await served.client.pause("in_place")
    names = list(new.weights())
    buckets = [{n: new.weights()[n] for n in names[i::3]} for i in range(3)]
    await served.client.push_weights(buckets, 7)
    served.pace.pass_s = 0.0
    if paused:
        await served.client.resume()
    mixed = 0
    for ids, task in zip(prompts, tasks, strict=True):
        out = joined(await task)
        assert len(out.tokens) == 150
        old = int((out.version == 0).sum())
        assert out.version.tolist() == [0] * old + [7] * (150 - old)
        mixed += 0 < old < 150
        for version, model in ((0, served.model), (7, new)):
            reference = log_p(model, ids, out.tokens)
            picked = reference.gather(1, torch.from_numpy(out.tokens.astype(np.int64))[:, None])[:, 0].numpy()
            mine = out.version == version
            np.testing.assert_allclose(out.logprob[mine], picked[mine], atol=TOLERANCE, rtol=0)
    assert mixed, "the update must have come in the middle"
    after = joined(await collect(served.client, request("after", prompts[0])))
    assert after.cached_tokens == 0 or after.version[0] == 7
    assert_exact(new, prompts[0], after)


async def test_keep_never_serves_old_keys_as_new(one: Served, tiny: Callable[..., TinyModel]) -> None:
    new, ids = tiny("qwen3", True, 1), prompt(40)
    await collect(one.client, request("old", ids, 5))  # leaves a cached prefix
    one.pace.pass_s = 0.01
    running = asyncio.create_task(collect(one.client, request("running", ids, 200)))
    await until(one, lambda info: info.counters["generated_tokens"] > 5)
    await one.client.push_weights([new.weights()], 3, kv="keep")
    one.pace.pass_s = 0.0
    fresh = joined(await collect(one.client, request("fresh", ids, 30)))
    assert fresh.cached_tokens == 0
    assert_exact(new, ids, fresh)
    out = joined(await running)
    old = int((out.version == 0).sum())
    assert 0 < old < 200
    assert out.version.tolist() == [0] * old + [3] * (200 - old)
    extended = np.concatenate([ids, out.tokens[:20]])
    child = joined(await collect(one.client, request("child", extended, 10)))
    assert child.cached_tokens <= len(ids) + 30  # from `fresh` at most, never from the row that straddled
    assert_exact(new, extended, child)


async def test_the_checksum_is_of_what_is_held(one: Served, tiny: Callable[..., TinyModel]) -> None:
    new = tiny("qwen3", True, 1)
    before = await one.checksum()
    await one.client.push_weights([new.weights()], 4)
    after = await one.checksum()
    assert (before[0], after[0]) == (0, 4)
    assert before[1] != after[1]
    assert_exact(new, prompt(9), joined(await collect(one.client, request("a", prompt(9)))))
    await one.client.push_weights([one.model.weights()], 5)
    assert await one.checksum() == (5, before[1])


async def test_a_wrong_update_changes_nothing(one: Served, tiny: Callable[..., TinyModel]) -> None:
    good = tiny("qwen3", True, 1).weights()
    before = await one.checksum()
    bad: dict[str, dict[str, torch.Tensor]] = {
        "model.norm.weight: shape": {**good, "model.norm.weight": torch.zeros(7)},
        "model.layers.1.mlp.up_proj.weight: dtype": {
            **good,
            "model.layers.1.mlp.up_proj.weight": good["model.layers.1.mlp.up_proj.weight"].half(),
        },
        "model.layers.9.mlp.up_proj.weight: no such": {
            **good,
            "model.layers.9.mlp.up_proj.weight": torch.zeros(2),
        },
        "model.norm.weight: missing": {k: v for k, v in good.items() if k != "model.norm.weight"},
    }
    for message, tensors in bad.items():
        with pytest.raises(EngineError, match=message):
            await one.client.push_weights([tensors], 9)
    assert await one.checksum() == before
    assert_exact(one.model, prompt(9), joined(await collect(one.client, request("a", prompt(9)))))


# Load -------------------------------------------------------------------------------------------


async def test_a_mixed_load_of_64(serve: Callable[..., Any], tiny: Callable[..., TinyModel]) -> None:
    """More requests than rows, of all kinds, with an update and an abort in their midst; all are exact."""
    served = await serve("qwen3", False, max_running=24, cache_slots=8)
    new, rng = tiny("qwen3", False, 1), np.random.default_rng(0)
    shared = prompt(30, 100)
    prompts = [
        np.concatenate([shared[: rng.integers(1, 31)], prompt(int(rng.integers(1, 60)), i)])
        for i in range(64)
    ]
    lengths = rng.integers(1, 120, 64)
    tasks = [
        asyncio.create_task(collect(served.client, request(f"m{i}", ids, int(n))))
        for i, (ids, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    await until(served, lambda info: info.counters["generated_tokens"] >= 300)
    await served.client.abort("m63")
    await served.client.push_weights([new.weights()], 1)
    for ids, n, task in zip(prompts[:-1], lengths, tasks, strict=False):
        out = joined(await task)
        assert len(out.tokens) == n
        for version, model in ((0, served.model), (1, new)):
            mine = out.version == version
            picked = log_p(model, ids, out.tokens).gather(
                1, torch.from_numpy(out.tokens.astype(np.int64))[:, None]
            )
            np.testing.assert_allclose(out.logprob[mine], picked[:, 0].numpy()[mine], atol=TOLERANCE, rtol=0)
    await tasks[-1]
    info = (await served.client.infos())[0]
    assert (info.running, info.waiting) == (0, 0)


async def test_replicas_share_the_routes(tiny: Callable[..., TinyModel], serve: Callable[..., Any]) -> None:
    first, second = await serve(), await serve()
    client = EngineClient([first.url, second.url])
    ids = prompt(20)
    for i in range(12):
        asked = GenerateRequest(str(i), ids, Sampling(2, ignore_eos=True), route=f"tree{i // 2}")
        out = joined(await collect(client, asked))
        if i % 2:  # the second branch of a route finds the first one's keys
            assert out.cached_tokens == 19
    assert all(info.counters["requests"] for info in await client.infos())
    await client.close()
