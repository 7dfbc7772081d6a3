"""What every engine must do, held against the Hugging Face model: the embedded engine and a real SGLang
server, through the one client, over real HTTP.

SGLang's half needs SGLang for CPU (``make sglang``, which ``make test`` does) and shares one server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from engine_models import (
    EOS,
    SGLANG_KEY,
    TOLERANCE,
    VOCAB,
    EngineClient,
    Growing,
    Served,
    TinyModel,
    assert_exact,
    collect,
    joined,
    log_p,
    prompt,
    request,
    text_of,
)
from transformers import GenerationConfig

from system.config import ConfigError, TeacherConfig
from system.engine.control import Http
from system.engine.entropy import entropy_bounds
from system.engine.protocol import EngineError, EngineInfo
from system.engine.score import score
from system.rollout.teacher import Teacher

pytestmark = pytest.mark.timeout(400)  # SGLang takes half a minute to start, more on a busy machine


@dataclass
class Subject:
    """A server with the weights of ``model``, at version 0."""

    name: str
    model: TinyModel
    client: EngineClient
    served: Served | None = None  # the embedded engine
    family: str = "qwen3"

    def pace(self, pass_s: float) -> None:
        """Seconds that a step takes at least.  SGLang's steps take as long as they take."""
        if self.served is not None:
            self.served.pace.pass_s = pass_s

    async def info(self) -> EngineInfo:
        return (await self.client.infos())[0]

    async def load(self, model: TinyModel, version: int, **more: Any) -> None:
        """Bring the server to other weights: by a push, or as only SGLang does by their directory."""
        if self.name == "embedded":
            await self.client.push_weights([model.weights()], version)
        else:
            await self.client.update_weights_from_disk(str(model.path), version, **more)


@pytest.fixture(
    params=[
        "embedded",
        "embedded, experts",
        "embedded, channel",
        pytest.param("sglang", marks=pytest.mark.sglang),
    ]
)
async def subject(
    request: pytest.FixtureRequest, serve: Callable[..., Any], tiny: Callable[..., TinyModel]
) -> AsyncIterator[Subject]:
    family = "qwen3_moe" if request.param.endswith("experts") else "qwen3"
    model = tiny(family, False)
    if request.param != "sglang":
        served = await serve(family, False, max_context=512)
        if request.param.endswith("channel"):
            await served.client.close()
            served.client = EngineClient([served.url], deadline_s=60, stall_s=30, channel=True)
        yield Subject("embedded", model, served.client, served, family)
        return
    client = EngineClient([request.getfixturevalue("sglang_url")], deadline_s=120, stall_s=60, key=SGLANG_KEY)
    try:
        if (await client.infos())[0].weight_version:
            await client.update_weights_from_disk(str(model.path), 0)
        yield Subject("sglang", model, client)
        await client.post("/abort_request", abort_all=True)
        assert not (await client.infos())[0].paused, "the test left the server paused"
    finally:
        await client.close()


# Numbers ----------------------------------------------------------------------------------------


async def test_log_probabilities_and_entropies_are_exact(subject: Subject) -> None:
    """At several temperatures, in a mixed batch, with and without a shared prefix."""
    base = prompt(40)
    cases = [(base[:1], 1.0), (base[:7], 0.6), (base, 1.0), (base, 1.4), (prompt(60, 2), 0.8)]
    cases.append((np.concatenate([base[:25], prompt(9, 1)]), 1.0))
    outs = await asyncio.gather(
        *(
            collect(subject.client, request(f"n{i}", ids, 12 + 5 * i, temperature=t))
            for i, (ids, t) in enumerate(cases)
        )
    )
    for i, ((ids, temperature), chunks) in enumerate(zip(cases, outs, strict=True)):
        out = joined(chunks)
        assert len(out.tokens) == 12 + 5 * i
        assert len(chunks) > 1, "it must stream"
        assert not np.isnan(out.entropy).any()
        assert_exact(subject.model, ids, out, temperature)


async def test_given_tokens_are_scored_under_one_version(
    subject: Subject, tiny: Callable[..., TinyModel]
) -> None:
    """From the second token on, in the middle, the last one alone; at several temperatures; with the prefix
    in the cache and without; and under new weights, though the old ones' keys and values are there.

    SGLang takes no notice of the temperature: the configuration has to (``test_config.py``).
    """
    ids = prompt(90, 5)
    cases = [(1, 1.0), (40, 1.0), (40, 0.7), (89, 1.3)]

    async def check(model: TinyModel, version: int) -> None:
        for start, temperature in cases * 2:
            rid = f"score {version} {start} {temperature} {len(asked)}"
            asked.append(rid)
            found = await score(subject.client, ids, start, rid=rid, temperature=temperature)
            used = temperature if subject.name == "embedded" else 1.0
            reference = log_p(model, ids[:start], ids[start:], used)
            own = reference.gather(1, torch.from_numpy(ids[start:].astype(np.int64))[:, None])[:, 0].numpy()
            np.testing.assert_allclose(found.logprob, own, atol=1e-5, rtol=0)
            assert found.version == version

    asked: list[str] = []
    await check(subject.model, 0)
    other = tiny(subject.family, False, 1)
    await subject.load(other, 3)
    await check(other, 3)


async def test_greedy_equals_hugging_face_generate(subject: Subject) -> None:
    for seed, length in enumerate((5, 30)):
        ids = prompt(length, seed)
        asked = request(f"g{seed}", ids, 30, temperature=0.0, ignore_eos=False)
        out = joined(await collect(subject.client, asked))
        settings = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=EOS, pad_token_id=EOS)
        expected = subject.model.hf.generate(torch.from_numpy(ids.astype(np.int64))[None], settings)
        assert out.tokens.tolist() == expected[0, length:].tolist()
        assert_exact(subject.model, ids, out)


@pytest.mark.parametrize(("top_p", "top_k"), [(0.7, -1), (1.0, 5), (0.8, 8), (1e-6, -1)])
async def test_truncation_reports_the_renormalised_probability(
    subject: Subject, top_p: float, top_k: int
) -> None:
    """The behaviour log-probability is over what top-p and top-k kept; the entropy over the vocabulary."""
    ids = prompt(20)
    asked = request("t", ids, 40, top_p=top_p, top_k=top_k, temperature=1.2)
    out = joined(await collect(subject.client, asked))
    assert len(out.tokens) == 40
    reference = log_p(subject.model, ids, out.tokens, 1.2).exp().double()
    for step, token in enumerate(out.tokens.tolist()):
        ordered, order = reference[step].sort(descending=True)
        keep = (ordered.cumsum(0) - ordered <= top_p) & (
            torch.arange(VOCAB) < (top_k if top_k > 0 else VOCAB)
        )
        kept = dict(zip(order[keep].tolist(), ordered[keep].tolist(), strict=True))
        assert token in kept, "a token that should have been dropped was drawn"
        assert out.logprob[step] == pytest.approx(np.log(kept[token] / sum(kept.values())), abs=TOLERANCE)
    entropy = -(reference * reference.log()).sum(-1).numpy()
    np.testing.assert_allclose(out.entropy, entropy, atol=TOLERANCE, rtol=0)


@pytest.mark.sglang
async def test_sglang_wants_its_key_and_tells_nobody(sglang_url: str) -> None:
    for key in ("", "wrong"):
        async with Http([sglang_url], key) as http:
            for path in ("/model_info", "/server_info", "/v1/loads"):
                with pytest.raises(EngineError, match="HTTP 401"):
                    await http.call(sglang_url + path)
            for path in ("/pause_generation", "/begin_weight_update", "/generate"):
                with pytest.raises(EngineError, match="HTTP 401"):
                    await http.call(sglang_url + path, {})
            await http.call(f"{sglang_url}/health")
    async with Http([sglang_url], SGLANG_KEY) as http:
        info = await http.call(f"{sglang_url}/server_info")
    assert SGLANG_KEY not in str(info)
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert not any(SGLANG_KEY in line for line in lines)


@pytest.mark.sglang
async def test_a_teacher_takes_as_many_tokens_as_it_says(sglang_url: str) -> None:
    """Of a context of 512, SGLang keeps seven for itself (``managers/utils.py``, validate_input_length)."""

    def teacher(longest: int) -> Teacher:
        return Teacher(TeacherConfig(urls=[sglang_url]), VOCAB, longest, SGLANG_KEY)

    await teacher(505).check()
    with pytest.raises(ConfigError, match=r"takes 505 tokens at most, and a branch may have 506"):
        await teacher(506).check()
    client = EngineClient([sglang_url], key=SGLANG_KEY, retries=0)
    try:
        assert (await score(client, prompt(505), 500, rid="longest")).logprob.size == 5
        with pytest.raises(EngineError):
            await score(client, prompt(506), 500, rid="longer")
    finally:
        await client.close()


@pytest.mark.sglang
async def test_top_tokens_bound_the_entropy(sglang_url: str) -> None:
    """What SGLang gives without our plug-in is enough for an estimate that says how far off it may be."""
    client = EngineClient([sglang_url], key=SGLANG_KEY)
    body = {
        "input_ids": prompt(20).tolist(),
        "sampling_params": {"max_new_tokens": 30, "temperature": 0.7, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": 20,
    }
    meta = (await client._http.call(f"{sglang_url}/generate", body, 60))["meta_info"]
    await client.close()
    top = [[entry[0] for entry in row] for row in meta["output_top_logprobs"]]
    low, high = entropy_bounds(top, VOCAB)
    exact = np.array(meta["entropy"])
    assert ((low - 1e-4 <= exact) & (exact <= high + 1e-4)).all()


# Endings ----------------------------------------------------------------------------------------


async def test_stop_strings_end_at_the_completing_token(subject: Subject) -> None:
    """Stop strings cut from what greedy decoding writes, across two tokens."""
    decode, ids = text_of(), prompt(10, 4)
    free = joined(await collect(subject.client, request("free", ids, 60, temperature=0.0))).tokens
    texts = [decode([token]) for token in free.tolist()]
    clean = [i for i in range(2, 58) if all("�" not in texts[j] and texts[j] for j in (i, i + 1))]
    assert clean, "the seed must give some plain text"
    for number, i in enumerate(clean[:4]):
        stop = texts[i][-1:] + texts[i + 1][:1]  # begins in one token, ends in the next
        upto = next(n for n in range(1, 61) if stop in decode(free[:n].tolist()))
        asked = request(f"s{number}", ids, 60, temperature=0.0, stop=("never occurs", stop))
        out = joined(await collect(subject.client, asked))
        assert out.finish is not None
        assert (out.finish.type, out.finish.matched) == ("stop", stop)
        assert out.tokens.tolist() == free[:upto].tolist()


async def test_stop_tokens_eos_and_length(subject: Subject) -> None:
    ids = prompt(10, 5)
    free = joined(await collect(subject.client, request("free", ids, 40, temperature=0.0)))
    assert free.finish is not None
    assert free.finish.type == "length"
    target = int(free.tokens[10])
    first = free.tokens.tolist().index(target)
    stopping: dict[str, Any] = {"stop_token_ids": (target,), "ignore_eos": False}
    asked = request("s", ids, 40, temperature=0.0, **stopping)
    out = joined(await collect(subject.client, asked))
    assert out.finish is not None
    assert (out.finish.type, out.finish.matched) == ("stop", target)
    assert out.tokens.tolist() == free.tokens[: first + 1].tolist()
    for number in range(200):
        out = joined(await collect(subject.client, request(f"e{number}", ids, 40, ignore_eos=False)))
        if out.finish is not None and out.finish.type == "stop":
            assert out.finish.matched == EOS
            assert out.tokens.tolist().index(EOS) == len(out.tokens) - 1
            return
        assert EOS not in out.tokens
    pytest.fail("no sample ended with EOS")


async def test_a_request_that_cannot_be_served_is_refused_at_once(subject: Subject) -> None:
    with pytest.raises(EngineError, match="refused"):
        await collect(subject.client, request("long", prompt(500), 100))
    with pytest.raises(EngineError, match="refused"):
        await collect(subject.client, request("odd", prompt(5), 10, temperature=-1.0))


async def test_abort_returns_what_there_is(subject: Subject) -> None:
    subject.pace(0.01)
    growing = Growing(subject.client, request("a", prompt(5), 400))
    other = Growing(subject.client, request("ab", prompt(6), 60))  # a prefix of its id is aborted, not it
    await growing.begun()
    await subject.client.abort("a")
    out = await growing.whole()
    assert out.finish is not None
    assert out.finish.type == "abort"
    assert 0 < len(out.tokens) < 400
    assert_exact(subject.model, prompt(5), out)
    assert len((await other.whole()).tokens) == 60


async def test_closing_the_iterator_aborts_on_the_server(subject: Subject) -> None:
    chunks = subject.client.generate(request("a", prompt(5), 450))
    await anext(chunks)
    await chunks.aclose()
    async with asyncio.timeout(60):
        while (await subject.info()).running:  # noqa: ASYNC110 (a server's state, not an event)
            await asyncio.sleep(0.05)


# Sharing ----------------------------------------------------------------------------------------


async def test_a_fork_shares_its_parents_prefix(subject: Subject) -> None:
    """Children of a finished turn compute only what came after it: the tool's result."""
    ids = prompt(60, 21)
    parent = joined(await collect(subject.client, request("parent", ids, 30)))
    assert parent.cached_tokens < 60
    longer = np.concatenate([ids, parent.tokens, prompt(8, 22)])
    outs = await asyncio.gather(*(collect(subject.client, request(f"c{i}", longer, 20)) for i in range(4)))
    for chunks in outs:
        out = joined(chunks)
        # The last sampled token's own keys were never needed, so they may have to be computed.
        assert out.cached_tokens >= len(ids) + len(parent.tokens) - 1
        assert_exact(subject.model, longer, out)


# Pause and weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_pause_stops_and_continue_goes_on(subject: Subject, mode: Any) -> None:
    ids = prompt(10)
    subject.pace(0.01)
    growing = Growing(subject.client, request("a", ids, 400))
    await growing.begun()
    await subject.client.pause(mode)
    subject.pace(0.0)
    try:
        assert (await subject.info()).paused
        assert await subject.client.healthy(), "paused is not dead"
        late = Growing(subject.client, request("late", ids, 5))
        await asyncio.sleep(0.3)
        count = growing.count
        await asyncio.sleep(0.3)
        assert growing.count == count < 400
        assert not late.count
    finally:
        await subject.client.resume()
    assert not (await subject.info()).paused
    assert_exact(subject.model, ids, await growing.whole())
    assert len((await late.whole()).tokens) == 5


async def test_pause_abort_ends_everything(subject: Subject) -> None:
    subject.pace(0.01)
    growing = [Growing(subject.client, request(str(i), prompt(9, i), 400)) for i in range(3)]
    for each in growing:
        await each.begun()
    await subject.client.pause("abort")
    try:
        for each in growing:
            finish = (await each.whole()).finish
            assert finish is not None
            assert finish.type == "abort"
    finally:
        await subject.client.resume()


async def test_every_token_carries_the_version_that_made_it(
    subject: Subject, tiny: Callable[..., TinyModel]
) -> None:
    """New weights in the middle of generation: each token equals the model of its version."""
    new = tiny(subject.family, False, 1)
    prompts = [prompt(20 + i, i) for i in range(4)]
    subject.pace(0.01)
    growing = [Growing(subject.client, request(f"u{i}", p, 300)) for i, p in enumerate(prompts)]
    for each in growing:
        await each.begun()
    await subject.client.pause("retract")
    subject.pace(0.0)
    try:
        await subject.load(new, 7)
    finally:
        await subject.client.resume()
    assert (await subject.info()).weight_version == 7
    mixed = 0
    for ids, each in zip(prompts, growing, strict=True):
        out = await each.whole()
        old = int((out.version == 0).sum())
        assert out.version.tolist() == [0] * old + [7] * (300 - old)
        mixed += 0 < old < 300
        picked = torch.from_numpy(out.tokens.astype(np.int64))[:, None]
        for version, model in ((0, subject.model), (7, new)):
            mine = out.version == version
            expected = log_p(model, ids, out.tokens).gather(1, picked)[:, 0].numpy()
            np.testing.assert_allclose(out.logprob[mine], expected[mine], atol=TOLERANCE, rtol=0)
    assert mixed, "the update must have come in the middle"


async def test_a_prefix_of_old_weights_is_never_served_as_new(
    subject: Subject, tiny: Callable[..., TinyModel]
) -> None:
    """Even where the cache is not flushed: it is keyed by weight version."""
    new, ids = tiny(subject.family, False, 1), prompt(80, 33)
    await collect(subject.client, request("warm", ids, 5))
    again = joined(await collect(subject.client, request("again", ids, 5)))
    assert again.cached_tokens == len(ids) - 1
    await subject.client.pause("in_place")
    try:
        await subject.load(new, 8, flush_cache=False)
    finally:
        await subject.client.resume()
    fresh = joined(await collect(subject.client, request("fresh", ids, 30)))
    assert fresh.cached_tokens == 0
    assert_exact(new, ids, fresh)
    after = joined(await collect(subject.client, request("after", ids, 5)))
    assert after.cached_tokens == len(ids) - 1


async def test_flush_forgets_prefixes_and_is_refused_while_busy(subject: Subject) -> None:
    ids = prompt(70, 44)
    await collect(subject.client, request("warm", ids, 5))
    await subject.client.flush_cache()
    assert joined(await collect(subject.client, request("cold", ids, 5))).cached_tokens == 0
    subject.pace(0.01)
    growing = Growing(subject.client, request("busy", ids, 300))
    await growing.begun()
    with pytest.raises(EngineError):
        await subject.client.flush_cache()
    subject.pace(0.0)
    await growing.whole()


# Load -------------------------------------------------------------------------------------------


async def test_a_mixed_load_of_64(subject: Subject) -> None:
    """More requests than rows, of all lengths, with shared prefixes and one abort; all are exact."""
    rng, shared = np.random.default_rng(0), prompt(30, 100)
    prompts = [
        np.concatenate([shared[: rng.integers(1, 31)], prompt(int(rng.integers(1, 60)), i)])
        for i in range(64)
    ]
    lengths = [int(n) for n in rng.integers(1, 100, 63)] + [400]
    growing = [
        Growing(subject.client, request(f"m{i}", ids, n))
        for i, (ids, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    await growing[0].begun()
    await subject.client.abort("m63")
    for ids, n, each in zip(prompts[:-1], lengths, growing, strict=False):
        out = await each.whole()
        assert len(out.tokens) == n
        assert_exact(subject.model, ids, out)
    await growing[-1].whole()
    async with asyncio.timeout(60):
        while (info := await subject.info()).running or info.waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
