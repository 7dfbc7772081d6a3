"""Scores of given tokens: the embedded engine's numbers, and what becomes of a call that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import web
from engine_models import (
    VOCAB,
    EngineClient,
    Served,
    TinyModel,
    assert_exact,
    collect,
    joined,
    log_p,
    prompt,
    request,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from system.config import ConfigError, TeacherConfig
from system.engine.embedded import scheduler
from system.engine.protocol import EngineError, EngineLost
from system.engine.score import score
from system.engine.stream import MalformedStream, StreamReader
from system.rollout.teacher import Teacher
from system.serving import AppServer, serve


@pytest.fixture
async def one(serve: Callable[..., Any]) -> Served:
    return await serve("qwen3", True)


def expected(model: TinyModel, ids: np.ndarray, start: int, temperature: float = 1.0) -> np.ndarray:
    """[P - start] Hugging Face's log-probabilities of ``ids`` from ``start`` on."""
    reference = log_p(model, ids[:start], ids[start:], temperature)
    return reference.gather(1, torch.from_numpy(ids[start:].astype(np.int64))[:, None])[:, 0].numpy()


@pytest.mark.parametrize("family", ["qwen2", "llama"])
async def test_scores_equal_hugging_face_beside_what_is_generated(
    serve: Callable[..., Any], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many at once, of all lengths, some in several passes, in the steps in which others decode."""
    monkeypatch.setitem(scheduler._PREFILL, "cpu", 64)
    served = await serve(family, True)
    base = prompt(150)
    cases = [
        (np.concatenate([base[:keep], prompt(rest, seed)]), start, temperature)
        for seed, (keep, rest, start, temperature) in enumerate(
            [(0, 2, 1, 1.0), (150, 1, 150, 1.0), (100, 50, 1, 0.6), (100, 30, 101, 1.0), (0, 200, 130, 1.5)]
        )
    ]
    texts = [collect(served.client, request(f"g{n}", prompt(20 * n + 5, n), 40)) for n in range(4)]
    told = asyncio.gather(*texts)
    found = await asyncio.gather(
        *(
            score(served.client, ids, start, rid=f"s{n} {again}", temperature=t)
            for again in range(2)
            for n, (ids, start, t) in enumerate(cases)
        )
    )
    for one, (ids, start, temperature) in zip(found, cases * 2, strict=True):
        np.testing.assert_allclose(one.logprob, expected(served.model, ids, start, temperature), atol=1e-5)
        assert one.version == 0
    for n, chunks in enumerate(await told):
        assert_exact(served.model, prompt(20 * n + 5, n), joined(chunks))
    assert served.client.counters["scored_tokens"] == 2 * sum(ids.size - start for ids, start, _ in cases)


async def test_a_score_of_what_was_sampled_is_what_it_was_sampled_with(one: Served) -> None:
    ids = prompt(30)
    said = joined(await collect(one.client, request("said", ids, 40, temperature=0.8)))
    whole = np.concatenate([ids, said.tokens])
    found = await score(one.client, whole, 30, rid="score", temperature=0.8, parent="said")
    np.testing.assert_allclose(found.logprob, said.logprob, atol=1e-5)
    counters = one.engine._scheduler.counters
    assert counters.cached_tokens >= 29, "the prefix was not computed again"


async def test_an_update_before_its_step_scores_under_the_new_weights(
    one: Served, tiny: Callable[..., TinyModel]
) -> None:
    """All tokens of one version: the one that it names."""
    ids, other = prompt(50), tiny("qwen3", True, 1)
    await collect(one.client, request("fills the cache", ids, 1))
    await one.client.pause("retract")
    waiting = asyncio.create_task(score(one.client, ids, 10, rid="waits"))
    async with asyncio.timeout(60):
        while not one.engine._scheduler.waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
    await one.client.push_weights([other.weights()], 7)
    await one.client.resume()
    found = await waiting
    assert found.version == 7
    np.testing.assert_allclose(found.logprob, expected(other, ids, 10), atol=1e-5)


async def test_a_step_that_fails_is_tried_again(one: Served) -> None:
    decoder, times = one.engine._scheduler._decoder, [2]

    class Faulty:
        def __getattr__(self, name: str) -> Any:
            return getattr(decoder, name)

        def scores(self, *given: Any) -> Any:
            if times[0]:
                times[0] -= 1
                raise RuntimeError("out of memory, say")
            return decoder.scores(*given)

    one.engine._scheduler._decoder = Faulty()  # type: ignore[assignment]
    ids = prompt(20)
    found = await score(one.client, ids, 5, rid="again")
    np.testing.assert_allclose(found.logprob, expected(one.model, ids, 5), atol=1e-5)
    assert times == [0]


async def test_a_cancelled_score_leaves_the_server(one: Served) -> None:
    await one.client.pause("retract")
    waiting = asyncio.create_task(score(one.client, prompt(50), 10, rid="gone"))
    async with asyncio.timeout(60):
        while not one.engine._scheduler.waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        while one.engine._scheduler.waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
    await one.client.resume()


async def test_a_score_keeps_the_deadline(one: Served) -> None:
    client = EngineClient([one.url], deadline_s=0.3)
    await one.client.pause("retract")
    with pytest.raises(EngineError, match="not done within"):
        await score(client, prompt(50), 10, rid="late")
    await one.client.resume()
    await client.close()


async def test_a_server_that_is_gone_is_an_error(free_port: Callable[[], int]) -> None:
    client = EngineClient([f"http://127.0.0.1:{free_port()}"], deadline_s=5, retries=1)
    with pytest.raises(EngineLost, match="gave up"):
        await score(client, prompt(9), 3, rid="nobody")
    await client.close()


async def test_a_server_that_does_not_score_is_an_error() -> None:
    """One that knows nothing of the field answers with a token and no scores."""

    async def generate(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        meta = b'{"completion_tokens": 1, "weight_version": "1", "finish_reason": {"type": "length"}, '
        meta += b'"output_token_logprobs": [[-1.0, 5, null]]}'
        await response.write(b'data: {"text": "a", "output_ids": [5], "meta_info": ' + meta + b"}\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_post("/generate", generate)
    server: AppServer = await serve(app, "127.0.0.1", 0)
    client = EngineClient([server.url])
    with pytest.raises(MalformedStream, match="input_token_logprobs"):
        await score(client, prompt(9), 3, rid="unknown")
    await client.close()
    await server.close()


@pytest.mark.parametrize("start", [0, 9, -1])
async def test_a_token_without_a_predecessor_or_none_cannot_be_scored(one: Served, start: int) -> None:
    with pytest.raises(ValueError, match="can be scored"):
        await score(one.client, prompt(9), start, rid="bad")


@pytest.mark.parametrize(
    ("field", "start", "new"),
    [("logprob_start_len", 8, 1), ("logprob_start_len", -2, 1), ("max_new_tokens must be 1", 2, 2)],
)
async def test_what_the_embedded_engine_cannot_score_it_refuses(
    one: Served, field: str, start: int, new: int
) -> None:
    body = {"rid": "r", "stream": True, "input_ids": list(range(9)), "logprob_start_len": start}
    with pytest.raises(EngineError, match=field):
        await one.client._http.call(
            f"{one.url}/generate",
            body | {"sampling_params": {"max_new_tokens": new}},
        )


@settings(max_examples=50)
@given(
    given_tokens=st.lists(st.integers(0, 99), min_size=1, max_size=9), more=st.integers(0, 5), data=st.data()
)
def test_a_reader_takes_the_scores_of_exactly_the_tokens_asked_for(
    given_tokens: list[int], more: int, data: st.DataObject
) -> None:
    """Servers may list more tokens before them; another token, a missing or an impossible number is found."""
    ids = np.array(given_tokens, np.int32)
    pairs = (
        [[None, 3, None]]
        + [[-9.0, 3, None]] * more
        + [[-i - 0.5, t, None] for i, t in enumerate(given_tokens)]
    )
    meta: dict[str, Any] = {
        "completion_tokens": 1,
        "weight_version": "4",
        "finish_reason": {"type": "length"},
        "output_token_logprobs": [[-1.0, 5, None]],
        "input_token_logprobs": pairs,
    }
    message = {"text": "a", "output_ids": [5], "meta_info": meta}
    chunk, _ = StreamReader(scored=ids).read(message)
    assert chunk.scores is not None
    assert chunk.scores.tolist() == [-i - 0.5 for i in range(ids.size)]
    at = -data.draw(st.integers(1, ids.size))
    fault = data.draw(
        st.sampled_from([[-0.5, 100, None], [None, pairs[at][1], None], [0.5, pairs[at][1], None]])
    )
    meta["input_token_logprobs"] = [*pairs[:at], fault, *pairs[len(pairs) + at + 1 :]]
    with pytest.raises(MalformedStream, match="input_token_logprobs"):
        StreamReader(scored=ids).read(message)


async def test_a_teacher_must_take_the_longest_branch(serve: Callable[..., Any]) -> None:
    """And takes as many tokens as it says."""
    served = await serve("qwen3", True, max_context=64)
    url = served.client.urls[0]

    def teacher(longest: int) -> Teacher:
        return Teacher(TeacherConfig(urls=[f"{url}/"]), VOCAB, longest)

    await teacher(63).check()
    assert (await score(served.client, prompt(63), 1, rid="longest")).logprob.size == 62
    with pytest.raises(ConfigError, match=r"teacher.urls\[0\]=.* takes 63 tokens at most, .* have 64 "):
        await teacher(64).check()
    with pytest.raises(EngineError):
        await score(served.client, prompt(64), 1, rid="longer")
