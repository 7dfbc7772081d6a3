"""Two real SGLang servers and this process in one gloo group: requests in flight, servers that hang, die and
are replaced.  Every update is proved by SGLang's own digests of all parameters (``system/engine/weights``).
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import psutil
import pytest
import torch
from engine_models import (
    SGLANG_KEY,
    EngineClient,
    Growing,
    TinyModel,
    assert_exact,
    collect,
    joined,
    prompt,
    request,
)

from system.engine.control import Http
from system.engine.sglang.server import SglangServer
from system.engine.weights import distributed
from system.engine.weights.distributed import Distributed, TorchGroup
from system.engine.weights.sglang import SGLangTransport

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(900)]
DEADLINE_S = 10.0
START_S = 400.0  # on a busy machine


class Counting(TorchGroup):
    """A group that counts what leaves, and may freeze a process before its second bucket."""

    sent, made, victim = 0, 0, 0

    def join(self) -> None:
        super().join()
        Counting.made += 1

    def broadcast(self, flat: torch.Tensor) -> None:
        if Counting.victim and Counting.sent:
            os.kill(Counting.victim, signal.SIGSTOP)
            Counting.victim = 0
        Counting.sent += flat.numel()
        super().broadcast(flat)


def scheduler_of(server: SglangServer) -> int:
    """The process that computes; the others of a server answer while it hangs."""
    family = psutil.Process(server._supervisor.pid).children(recursive=True)
    (found,) = [one.pid for one in family if "sglang::scheduler" in " ".join(one.cmdline())]
    return found


async def test_two_servers_in_one_group(
    start_sglang: Callable[..., SglangServer],
    tiny: Callable[..., TinyModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "GROUP_DEADLINE_S", DEADLINE_S)
    models = [tiny("qwen3", False, seed) for seed in (0, 1)]
    size = sum(t.numel() * 4 for t in models[0].weights().values())
    short = {"ESPALIER_GROUP_DEADLINE_S": str(DEADLINE_S)}
    servers = [start_sglang(**short), start_sglang(**short)]
    urls = [await asyncio.to_thread(server.wait_ready, START_S) for server in servers]
    transport = SGLangTransport(Distributed("127.0.0.1", Counting), models[0].path, "float32")

    async def push(version: int, *to: str) -> dict[str, str]:
        weights = models[version % 2].weights()
        buckets = [{name: weights[name] for name in list(weights)[i::3]} for i in range(3)]
        async with Http(urls, SGLANG_KEY) as http:
            return dict((await transport.push(http, to or urls, buckets, version, "recompute")).failures)

    async def assert_served(version: int, *at: str) -> None:
        for url in at or urls:
            client = EngineClient([url], deadline_s=120, key=SGLANG_KEY)
            try:
                out = joined(await collect(client, request(f"v{version}-{url}", prompt(9), 6)))
                assert set(out.version.tolist()) == {version}
                assert_exact(models[version % 2], prompt(9), out)
            finally:
                await client.close()

    # Requests run through updates, which leave this process once, in one group.
    clients = [EngineClient([url], deadline_s=300, key=SGLANG_KEY) for url in urls]
    assert not await push(1)
    running = [
        Growing(client, request(f"{i}-{client.urls[0]}", prompt(20, i), 480))
        for client in clients
        for i in range(4)
    ]
    for one in running:
        await one.begun()
    Counting.sent = 0
    assert not await push(2)
    assert Counting.sent == size
    assert Counting.made == 1
    spans = [set((await one.whole()).version.tolist()) for one in running]
    assert all(span <= {1, 2} for span in spans)
    assert any(span == {1, 2} for span in spans), "the update must have come in the middle"
    for client in clients:
        await client.close()
    await assert_served(2)

    # One hangs in the middle of an update: the other gets it all the same.  It is back, and takes the next.
    Counting.victim, Counting.sent = (frozen := scheduler_of(servers[0])), 0
    try:
        assert list(await push(3)) == [urls[0]]
    finally:
        os.kill(frozen, signal.SIGCONT)
    await assert_served(3, urls[1])
    assert not await push(4)
    await assert_served(4)

    # One is killed between two updates; another takes its place.
    servers[1].kill()
    assert list(await push(5)) == [urls[1]]
    await assert_served(5, urls[0])
    servers[1] = start_sglang(**short, ESPALIER_START_PAUSED="1")
    urls[1] = await asyncio.to_thread(servers[1].wait_ready, START_S)
    assert not await push(5, urls[1])  # brought up alone, out of its pause
    assert not await push(6)
    await assert_served(6)
    made = Counting.made
    assert not await push(7)
    assert Counting.made == made, "a group lasts from update to update"
