"""Which experts the tokens of a request went through, as an engine tells it, held against Hugging Face."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import (
    VOCAB,
    EngineClient,
    Growing,
    Served,
    TinyModel,
    collect,
    joined,
    make_tokenizer,
    prompt,
    request,
)
from rollout_fakes import SPECS, CountWords, ScriptedTools, ok
from test_engine_resilience import cutting_proxy
from test_partial_rollout import PROMPT

from system.config import RolloutConfig
from system.engine.protocol import Chunk, EngineError, Finish, GenerateRequest
from system.engine.request import generate_body
from system.engine.routes import RouteFormat
from system.engine.stream import MalformedStream, StreamReader, WantedRoutes
from system.models.shape import ModelShape
from system.rollout.branching import Decision, Policy, Probe, TreeState
from system.rollout.context import RolloutContext
from system.rollout.scorer import Scorer
from system.rollout.scoring import Scoring
from system.rollout.syntax.tags import TagSyntax
from system.rollout.tree_rollout import TreeRollout
from system.tree.record import Kind
from system.tree.routes import Routes, recorded


@torch.no_grad()
def hf_routes(model: TinyModel, ids: np.ndarray) -> np.ndarray:
    """[T, sparse layers, k] Hugging Face's own choice, in ascending order."""
    chosen: list[torch.Tensor] = []
    gates = [layer.mlp.gate for layer in model.hf.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [gate.register_forward_hook(lambda _, __, out: chosen.append(out[2])) for gate in gates]
    model.hf(torch.from_numpy(ids.astype(np.int64))[None])
    for hook in hooks:
        hook.remove()
    return np.sort(torch.stack(chosen, 1).numpy(), -1)


def asked(rid: str, ids: np.ndarray, new: int = 24, first: int = 0, **sampling: Any) -> GenerateRequest:
    return replace(request(rid, ids, new, **sampling), routes_from=first)


def told(chunks: list[Chunk]) -> Routes:
    """What came with the last message, and with no other."""
    assert all(chunk.routes is None for chunk in chunks[:-1])
    assert chunks[-1].routes is not None
    return chunks[-1].routes


def client_of(served: Served, *urls: str) -> EngineClient:
    known = RouteFormat.of_directory(served.model.path)
    return EngineClient([*urls] or [served.url], deadline_s=60, stall_s=30, routes=known)


@pytest.fixture(params=[False, True], ids=["all sparse", "one dense"])
async def one(request: pytest.FixtureRequest, serve: Callable[..., Any]) -> Served:
    served = await serve("qwen3_moe", request.param)
    await served.client.close()
    served.client = client_of(served)
    return served


async def test_routes_are_hugging_faces_choice(one: Served) -> None:
    """In a mixed batch, in passes of a part of a prompt, of cached prefixes and from any token on."""
    one.engine._scheduler._max_prefill = 24
    base = prompt(60)
    cases = [(base[:1], 0), (base[:30], 4), (base, 0), (base, 59), (base, 60)]
    cases += [(np.concatenate([base[:25], prompt(9, 1)]), 10)]
    for again in range(2):
        outs = await asyncio.gather(
            *(
                collect(one.client, asked(f"{i} {again}", ids, 12 + i, first))
                for i, (ids, first) in enumerate(cases)
            )
        )
        for (ids, first), chunks in zip(cases, outs, strict=True):
            expected = hf_routes(one.model, np.concatenate([ids, joined(chunks).tokens]))[first:-1]
            np.testing.assert_array_equal(np.sort(told(chunks), -1), expected)
    assert joined(outs[2]).cached_tokens == 59, "routes of a prefix that this request did not compute"
    none = await collect(one.client, request("none", base, 5))
    assert none[-1].routes is None


async def test_routes_after_new_weights_are_of_the_pass_that_computed_the_keys(
    one: Served, tiny: Callable[..., TinyModel]
) -> None:
    new, ids = tiny("qwen3_moe", one.model.hf.config.tie_word_embeddings, 1), prompt(20)
    one.pace.pass_s = 0.01
    growing = Growing(one.client, asked("a", ids, 60))
    await growing.begun()
    one.pace.pass_s = 0.0
    await one.client.push_weights([new.weights()], 1)
    out = await growing.whole()
    assert set(out.version.tolist()) == {0, 1}
    expected = hf_routes(new, np.concatenate([ids, out.tokens]))[:-1]
    np.testing.assert_array_equal(np.sort(told(growing.chunks), -1), expected)


async def test_a_stream_that_breaks_brings_the_routes_of_all_its_tokens(one: Served) -> None:
    async with cutting_proxy(one.url, 4000, 1) as url:
        client = client_of(one, url)
        chunks = await collect(client, asked("torn", prompt(9), 120, 3))
        assert client.counters["resumed"] == 1
        await client.close()
    expected = hf_routes(one.model, np.concatenate([prompt(9), joined(chunks).tokens]))[3:-1]
    np.testing.assert_array_equal(np.sort(told(chunks), -1), expected)


async def test_an_aborted_request_has_no_routes(one: Served) -> None:
    one.pace.pass_s = 0.01
    growing = Growing(one.client, asked("a", prompt(5), 200))
    await growing.begun()
    await one.client.abort("a")
    await growing.whole()
    assert growing.chunks[-1].finish == Finish("abort", message="aborted")
    assert growing.chunks[-1].routes is None


async def test_routes_of_a_model_without_experts_are_refused(serve: Callable[..., Any]) -> None:
    served = await serve("qwen3", True)
    with pytest.raises(EngineError, match="experts of a model that has none, or unknown"):
        await collect(served.client, asked("a", prompt(5)))
    believing = EngineClient([served.url], routes=RouteFormat(2, (0, 1), 8, 2), deadline_s=60)
    with pytest.raises(EngineError, match="return_routed_experts: the model has no experts"):
        await collect(believing, asked("b", prompt(5)))
    await believing.close()


async def test_a_start_that_is_no_token_is_refused(one: Served) -> None:
    with pytest.raises(EngineError, match="routed_experts_start_len: expected one of 0 to 5"):
        await collect(one.client, asked("a", prompt(5), first=6))


FORMAT = RouteFormat(layers=3, sparse=(0, 2), experts=300, chosen=2)
RIGHT = np.array([[[0, 1], [7, 7], [299, 2]], [[3, 1], [-1, 900], [5, 4]]], "<i4")  # layer 1 is dense


def changed(at: tuple[int, int, int], value: int) -> np.ndarray:
    other = RIGHT.copy()
    other[at] = value
    return other


def text(numbers: np.ndarray) -> str:
    return base64.b64encode(numbers.astype("<i4").tobytes()).decode()


def test_a_record_is_read_without_dense_layers_and_written_alike() -> None:
    found = FORMAT.read(text(RIGHT), 2)
    assert (found.dtype, found.tolist()) == (np.uint16, RIGHT[:, [0, 2]].tolist())
    np.testing.assert_array_equal(FORMAT.read(FORMAT.write(found), 2), found)
    assert replace(FORMAT, experts=255).read(text(changed((0, 2, 0), 254)), 2).dtype == np.uint8


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (text(RIGHT[:1]), "6 numbers, not 2 tokens x 3 layers x 2 experts"),
        (text(changed((0, 0, 0), 300)), "300 is none of 300 experts"),
        (text(changed((1, 2, 1), -1)), "-1 is none of 300 experts"),
        (text(changed((1, 2, 1), 5)), "a token that goes through one expert twice"),
        ("AAA", "routed_experts: "),
        ("AAA=", "routed_experts: "),
        (7, "routed_experts: "),
        (None, "start it with --enable-return-routed-experts, or set rollout.replay_routes=false"),
    ],
)
def test_a_record_that_cannot_be_is_refused(record: Any, message: str) -> None:
    meta = {
        "completion_tokens": 1,
        "output_token_logprobs": [[-0.5, 4, None]],
        "weight_version": "0",
        "finish_reason": {"type": "length"},
        "routed_experts": record,
    }
    reader = StreamReader(routes=WantedRoutes(FORMAT, first=3, prompt=5))
    with pytest.raises(MalformedStream, match=message):
        reader.read({"meta_info": meta, "output_ids": [4]})


def test_sglang_is_asked_in_its_words() -> None:
    body = json.loads(generate_body(asked("a", prompt(5), 9, 2), "a", [7], every_token=False, top_logprobs=0))
    assert body["return_routed_experts"] is True
    assert body["routed_experts_start_len"] == 2
    plain = json.loads(generate_body(request("a", prompt(5)), "a", [], every_token=False, top_logprobs=0))
    assert not [name for name in plain if "routed" in name]


# Trees ------------------------------------------------------------------------------------------


class Calling:
    """An engine whose model calls a tool at the end of each of its first two turns."""

    def __init__(self, client: EngineClient) -> None:
        self.client, self.tokenizer = client, make_tokenizer()
        self.call = self.tokenizer.encode("<search> fox </search>")

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        said = self.tokenizer.decode(request.input_ids.tolist()).count("</search>")
        calls = said < 2 + self.tokenizer.decode(PROMPT_IDS).count("</search>")
        sampling = replace(request.sampling, max_new_tokens=9, ignore_eos=True, stop=(), stop_token_ids=())
        async for chunk in self.client.generate(replace(request, sampling=sampling)):
            if chunk.finish is None or not calls:
                yield chunk
                continue
            yield replace(chunk, finish=None, routes=None)
            zeros = np.zeros(len(self.call), np.float32)
            version = np.zeros(len(self.call), np.int32)
            tokens = np.array(self.call, np.int32)
            yield Chunk(tokens, zeros, zeros, version, Finish("stop", "</search>"), routes=chunk.routes)


PROMPT_IDS = make_tokenizer().encode(PROMPT.messages[0]["content"])


class Always(Policy):
    def decide(self, probe: Probe, state: TreeState, rng: np.random.Generator) -> Decision:
        return Decision(1, 1.0, 0.0, 0.0)


async def test_a_tree_has_the_routes_of_all_that_the_engine_computed(one: Served) -> None:
    """Prompt, turns, tools' answers and forks: all but what each branch ends with."""
    context = RolloutContext(
        engine=Calling(one.client),
        tools=ScriptedTools(lambda tool, arguments: ok("brown dog", 0.01)),
        syntax=TagSyntax(SPECS),
        policy=Always(3),
        scoring=Scoring([Scorer(CountWords())]),
        tokenizer=make_tokenizer(),
        config=RolloutConfig(leaves=5, roots=2, max_response_tokens=200),
        vocab_size=VOCAB,
        routes=True,
    )
    tree = await TreeRollout(context, PROMPT, seed=3).run()
    assert tree.origins(1) == 3  # forks
    assert {Kind.PROMPT, Kind.MODEL, Kind.TOOL} == set(tree.kind.tolist())
    shape = ModelShape.from_directory(one.model.path)
    assert shape.experts is not None
    assert tree.routes.shape == (tree.n_tokens, shape.experts.layers, 2)
    there = recorded(tree.routes)
    ends = {int(tree.end[node]) - 1 for node in tree.leaf.tolist()}
    assert np.flatnonzero(~there).tolist() == sorted(ends)
    for leaf in range(tree.n_leaves):
        spans = [np.arange(tree.start[node], tree.end[node]) for node in tree.path(leaf)]
        index = np.concatenate(spans)
        expected = hf_routes(one.model, tree.tokens[index])
        known = there[index]
        np.testing.assert_array_equal(np.sort(tree.routes[index][known], -1), expected[known])
    evaluated = await TreeRollout(context, PROMPT, seed=3, greedy=True).run()
    assert not evaluated.routed
