"""The engine model against hand counts: processor sharing, prefixes, memory, weight updates, death."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
import pytest

from system.engine.protocol import Chunk, EngineError, GenerateRequest, Sampling
from system.twin.agent import TEXT, AgentModel
from system.twin.clock import run
from system.twin.dist import Constant
from system.twin.engine_model import EngineModel
from system.twin.prefix import PrefixCache
from system.twin.speeds import LinearEngine

PROMPT = np.full(100, TEXT, np.int32)
STEP, SHARE, PREFILL = 0.01, 0.002, 1e-3  # seconds per step, per sequence in it, per prompt token


def engine(tokens: int = 50, kv: int = 1 << 30, calls: float = 0.0, **settings: int) -> EngineModel:
    return EngineModel(
        "engine-0",
        LinearEngine(STEP, SHARE, per_prefill_s=PREFILL, kv_tokens=kv),
        AgentModel(segment_tokens=Constant(tokens), p_call=(calls,)),
        first_tokens=settings.get("first", 8),
        max_running=settings.get("rows", 64),
        stops={0: "</search>"},
    )


def request(name: str, ids: np.ndarray = PROMPT, route: str = "", limit: int = 10_000) -> GenerateRequest:
    return GenerateRequest(name, ids, Sampling(limit, seed=hash_of(name)), route or name)


def hash_of(name: str) -> int:
    return sum(name.encode())


@dataclass
class Heard:
    """What a reader got: chunks, and when each came."""

    chunks: list[Chunk]
    times: list[float]

    @property
    def tokens(self) -> np.ndarray:
        return np.concatenate([chunk.tokens for chunk in self.chunks])

    @property
    def versions(self) -> list[int]:
        return np.concatenate([chunk.version for chunk in self.chunks]).tolist()


async def listen(model: EngineModel, wanted: GenerateRequest) -> Heard:
    heard = Heard([], [])
    async for chunk in model.generate(wanted):
        heard.chunks.append(chunk)
        heard.times.append(asyncio.get_running_loop().time())
    return heard


def play(main: Callable[[], Awaitable[list[Heard]]]) -> list[Heard]:
    async def body() -> list[Heard]:
        return await main()

    return run(body())


def test_one_sequence_takes_its_prefill_and_a_step_per_further_token() -> None:
    model = engine(tokens=50)
    (heard,) = play(lambda: asyncio.gather(listen(model, request("a"))))
    step = STEP + SHARE
    assert heard.times == pytest.approx([0.1 + 7 * step, 0.1 + 49 * step])
    assert [chunk.tokens.size for chunk in heard.chunks] == [8, 42]
    assert heard.chunks[-1].finish is not None
    assert model.busy_s == pytest.approx(0.1 + 49 * step)


def test_sequences_share_the_steps_and_the_survivor_speeds_up() -> None:
    model = engine(tokens=50)
    limits = {"a": 20, "b": 50}
    a, b = play(lambda: asyncio.gather(*(listen(model, request(n, limit=m)) for n, m in limits.items())))
    both, alone = STEP + 2 * SHARE, STEP + SHARE
    assert a.times[-1] == pytest.approx(0.2 + 19 * both)
    assert b.times[-1] == pytest.approx(0.2 + 19 * both + 30 * alone)
    assert a.chunks[-1].finish is not None
    assert a.chunks[-1].finish.type == "length"


def test_an_arrival_is_prefilled_at_the_next_token_boundary_and_stalls_the_others() -> None:
    model = engine(tokens=50)

    async def main() -> list[Heard]:
        first = asyncio.create_task(listen(model, request("a")))
        await asyncio.sleep(0.1 + 10.5 * (STEP + SHARE))
        second = asyncio.create_task(listen(model, request("b")))
        return [await first, await second]

    a, _ = play(main)
    alone, both = STEP + SHARE, STEP + 2 * SHARE
    assert a.times[-1] == pytest.approx(0.1 + 11 * alone + 0.1 + 38 * both)


def test_siblings_and_later_turns_reuse_the_prefix() -> None:
    model = engine(tokens=30, calls=1.0)

    async def main() -> list[Heard]:
        first = await listen(model, request("a", route="tree"))
        path = np.concatenate([PROMPT, first.tokens, np.full(10, TEXT, np.int32)])
        parent = await listen(model, request("b", path, route="tree"))
        child = await listen(model, request("c", path, route="tree"))
        stranger = await listen(model, request("d", route="other"))
        return [first, parent, child, stranger]

    cached = [heard.chunks[-1].cached_tokens for heard in play(main)]
    assert cached == [0, 130, 139, 0]  # all but the result; then all but the last token


def test_a_full_cache_forgets_the_unused_then_retracts_the_newest() -> None:
    model = engine(tokens=400, kv=700)
    heard = play(lambda: asyncio.gather(*(listen(model, request(n)) for n in "ab")))
    assert [one.tokens.size for one in heard] == [400, 400]  # nothing is lost
    assert model.retracted == 1
    assert heard[0].times[-1] < heard[1].times[-1]  # the newest waits
    assert model._cache.held + model._grown <= 700


def test_rows_limit_how_many_run() -> None:
    model = engine(tokens=10, rows=1)
    a, b = play(lambda: asyncio.gather(*(listen(model, request(n)) for n in "ab")))
    assert b.times[0] >= a.times[-1] + 0.1


@pytest.mark.parametrize("keep", [False, True])
def test_an_update_pauses_at_a_boundary_and_later_tokens_carry_the_new_version(keep: bool) -> None:
    model = engine(tokens=50)

    async def main() -> list[Heard]:
        reading = asyncio.create_task(listen(model, request("a")))
        await asyncio.sleep(0.1 + 19.5 * (STEP + SHARE))
        await model.update(7, 2.0, keep=keep)
        return [await reading]

    (heard,) = play(main)
    assert heard.versions == [0] * 21 + [7] * 29
    again = 0.0 if keep else 121 * PREFILL  # prompt and the 21 tokens said so far, which yields one more
    steps = 49 if keep else 48
    assert heard.times[-1] == pytest.approx(0.1 + 2.0 + again + steps * (STEP + SHARE))
    assert model.idle_s["updating"] == pytest.approx(2.0)


def test_death_fails_what_runs_and_a_restart_serves_what_waits() -> None:
    model = engine(tokens=50)

    async def main() -> list[Heard]:
        running = asyncio.create_task(listen(model, request("a")))
        await asyncio.sleep(0.2)
        model.kill()
        with pytest.raises(EngineError, match="connection lost"):
            await running
        later = asyncio.create_task(listen(model, request("b")))
        await asyncio.sleep(5.0)
        assert not later.done()
        model.restart(3)
        return [await later]

    (heard,) = play(main)
    assert set(heard.versions) == {3}
    assert model.idle_s["down"] == pytest.approx(5.0)


def test_closing_a_stream_frees_its_place() -> None:
    model = engine(tokens=1000)

    async def main() -> list[Heard]:
        async for _ in model.generate(request("a")):
            break
        await asyncio.sleep(1.0)
        assert model.load == 0
        assert model._grown == model._context == 0
        return [await listen(model, request("b", limit=5))]

    play(main)


def test_cache_accounts_for_every_token() -> None:
    cache = PrefixCache()
    short, long = (("p", 10), (1, 5)), (("p", 10), (1, 8), (2, 4))
    assert cache.pin(short) == 15
    assert cache.match(long) == 15  # unit 1 is held in part: nothing behind it counts
    assert cache.pin(long) == 7
    cache.evict(100)
    assert cache.held == 22  # all in use
    cache.unpin(long)
    cache.evict(1)
    assert cache.held == 18  # the leaf goes first
    cache.unpin(short)
    cache.evict(100)
    assert cache.held == 0


def test_a_mixed_prefill_takes_part_in_a_step() -> None:
    model = EngineModel(
        "engine-0",
        LinearEngine(STEP, SHARE, per_prefill_s=PREFILL),
        AgentModel(segment_tokens=Constant(50), p_call=(0.0,)),
        first_tokens=8,
        max_running=64,
        stops={},
        mixed=True,
    )

    async def main() -> list[Heard]:
        first = asyncio.create_task(listen(model, request("a")))
        await asyncio.sleep(0.1 + 10.5 * (STEP + SHARE))
        return [*await asyncio.gather(first, listen(model, request("b")))]

    a, _ = play(main)
    alone, both = STEP + SHARE, STEP + 2 * SHARE
    assert a.times[-1] == pytest.approx(0.1 + 11 * alone + 0.1 + 39 * both)
    assert model.steps == 50 + 11
