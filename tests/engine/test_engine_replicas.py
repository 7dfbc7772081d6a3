"""Several servers behind one client: death in mid-stream, pauses, turns, aborts."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from engine_models import EngineClient, Served, TinyModel, assert_exact, collect, joined, prompt, request

from system.engine.protocol import Chunk
from system.serving import free_port


@dataclass
class Process:
    url: str
    process: asyncio.subprocess.Process

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)


# The server, each step of which takes so many seconds longer.
PACED = """
import sys, time
from system.engine.embedded import __main__ as server, model
forward = model.Decoder.forward
def paced(*given):
    time.sleep({pass_s})
    return forward(*given)
model.Decoder.forward = paced
server.main(sys.argv[1:])
"""


@asynccontextmanager
async def server_process(model: TinyModel, port: int = 0, pass_s: float = 0.0) -> AsyncIterator[Process]:
    """An embedded server in a process of its own, which may be killed.

    ``pass_s``: seconds that a step of it takes at least.  It goes on while this process stands still: what is
    to happen in the middle of an answer needs one that is slow.
    """
    port = port or free_port()
    program = PACED.format(pass_s=pass_s)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, "--model", str(model.path), "--port", str(port)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    try:
        yield Process(f"http://127.0.0.1:{port}", process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_branch_goes_on_elsewhere_when_its_server_is_killed(tiny: Callable[..., TinyModel]) -> None:
    """Not a token lost, doubled or changed: with a seed it is the sequence an unbroken stream gives.
    Afterwards the killed server comes back and is used again.
    """
    model, ids = tiny(), prompt(12)
    async with server_process(model, pass_s=0.005) as first, server_process(model, pass_s=0.005) as second:
        client = EngineClient([first.url, second.url], deadline_s=60)
        await client.wait_ready(60)
        whole = joined(await collect(client, request("whole", ids, 400, seed=3)))
        chunks: list[Chunk] = []
        victim = None
        async for chunk in client.generate(replace(request("cut", ids, 400, seed=3), route="t")):
            chunks.append(chunk)
            if victim is None and sum(len(one.tokens) for one in chunks) >= 40:
                running = [info.running for info in await client.infos()]
                victim = (first, second)[running.index(1)]
                victim.kill()
        out = joined(chunks)
        assert victim is not None
        assert out.tokens.tolist() == whole.tokens.tolist()
        assert_exact(model, ids, out)
        assert client.counters["route/failover"] == 1
        assert client.counters["resumed"] == 1
        for i in range(4):  # nobody is sent to the dead one any more
            await collect(client, replace(request(f"n{i}", ids, 4), route=f"n{i}"))
        assert client.counters["route/failover"] == 1
        async with server_process(model, int(victim.url.rsplit(":", 1)[1])) as back:
            again = EngineClient([back.url])
            await again.wait_ready(60)
            async with asyncio.timeout(30):
                number = 0
                while not (await again.infos())[0].counters["requests"]:
                    await collect(client, replace(request(f"b{number}", ids, 4), route=f"b{number}"))
                    number += 1
            await again.close()
        await client.close()


@pytest.fixture
async def pair(serve: Callable[..., Any]) -> tuple[Served, Served]:
    return await serve("qwen3", True), await serve("qwen3", True)


async def test_a_paused_server_is_avoided_and_comes_back(pair: tuple[Served, Served]) -> None:
    first, second = pair
    client = EngineClient([first.url, second.url], deadline_s=30)
    await first.client.pause("retract")
    for i in range(6):
        await collect(client, replace(request(f"p{i}", prompt(5, i), 2), route=f"p{i}"))
    assert second.engine.load_report()["requests"] == 6
    await first.client.resume()
    before, number = first.engine.load_report()["requests"], 0
    async with asyncio.timeout(60):  # its next report says that it goes on
        while first.engine.load_report()["requests"] == before:
            await collect(client, replace(request(f"q{number}", prompt(5, number), 2), route=f"q{number}"))
            number += 1
    await client.close()


async def test_children_find_their_parents_keys(pair: tuple[Served, Served]) -> None:
    """Eight trees on two idle servers: each continuation lands where its parent's keys are."""
    client = EngineClient([served.url for served in pair])
    for number in range(8):
        ids = prompt(30, number)
        root = replace(request(f"{number}/root", ids, 12), route=f"t{number}")
        out = joined(await collect(client, root))
        longer = np.concatenate([ids, out.tokens, prompt(5, 100 + number)])
        for child in range(2):
            asked = replace(request(f"{number}/{child}", longer, 4), route=f"t{number}", parent=root.rid)
            assert joined(await collect(client, asked)).cached_tokens >= 30 + 12 - 1
    assert [served.engine.load_report()["requests"] for served in pair] == [12, 12]
    counters = client.counters
    assert (counters["route/new"], counters["route/affinity"]) == (8, 16)
    assert counters["cached_tokens"] >= 16 * 41
    await client.close()


async def test_turns_are_bounded_fair_and_counted(serve: Callable[..., Any]) -> None:
    one = await serve("qwen3", True)
    client = EngineClient([one.url], in_flight=2, deadline_s=60)
    began: list[int] = []
    most = 0

    async def ask(number: int) -> None:
        nonlocal most
        async for _ in client.generate(request(str(number), prompt(5), 30)):
            if number not in began:
                began.append(number)
            load = one.engine.load_report()
            most = max(most, load["num_running_reqs"] + load["num_waiting_reqs"])

    tasks = []
    for number in range(8):
        tasks.append(asyncio.create_task(ask(number)))
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert most <= 2
    # The two that have turns run side by side: within a pair either may be seen first.
    assert all(abs(place - number) <= 1 for place, number in enumerate(began)), began
    assert client.counters["turn_waits"] == 6
    assert client.counters["turn_wait_s"] > 0
    await client.close()


async def test_a_request_that_waits_for_its_turn_can_be_given_up(serve: Callable[..., Any]) -> None:
    one = await serve("qwen3", True, pass_s=0.01)
    client = EngineClient([one.url], in_flight=1, deadline_s=60)
    running = asyncio.create_task(collect(client, request("runs", prompt(5), 240)))
    waiting = [asyncio.create_task(collect(client, request(f"w{i}", prompt(5), 240))) for i in range(3)]
    async with asyncio.timeout(60):
        while not (await one.client.infos())[0].running:  # noqa: ASYNC110 (a server's state)
            await asyncio.sleep(0.002)
    waiting[0].cancel()
    await asyncio.wait(waiting[:1], timeout=60)
    assert waiting[0].cancelled()
    assert not running.done()
    for task in (running, *waiting[1:]):
        task.cancel()
    await asyncio.wait((running, *waiting[1:]), timeout=60)
    async with asyncio.timeout(60):
        while (await one.client.infos())[0].running:  # noqa: ASYNC110 (a server's state)
            await asyncio.sleep(0.002)
    late = joined(await collect(client, request("late", prompt(5), 4)))
    assert late.tokens.size == 4, "every turn was given back"
    await client.close()


async def test_a_request_that_waits_too_long_says_so(serve: Callable[..., Any]) -> None:
    one = await serve("qwen3", True)
    client = EngineClient([one.url], in_flight=1, deadline_s=0.4)
    await one.client.pause("retract")
    results = await asyncio.gather(
        *(collect(client, request(str(i), prompt(5), 4)) for i in range(3)), return_exceptions=True
    )
    assert all("not done within 0.4 s" in str(result) for result in results)
    await one.client.resume()
    client._deadline_s = 60.0
    assert joined(await collect(client, request("late", prompt(5), 4))).tokens.size == 4
    await client.close()
