"""One group for all servers: servers that die, hang or join in the middle of updates, as processes of their
own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest
import torch

from system.bench import weights as bench
from system.bench.fake_sglang import Behaviour
from system.bench.processes import server
from system.engine.control import Http
from system.engine.weights import distributed
from system.engine.weights import sglang as protocol
from system.engine.weights.base import PushReport
from system.engine.weights.distributed import Distributed
from system.engine.weights.sglang import SGLangTransport
from system.models.shape import ModelShape

pytestmark = pytest.mark.timeout(120)
DEADLINE_S = 4.0  # of a collective here, for its members and for this process
BUCKETS = 3
UPDATE = "update_weights_from_distributed"


class Cluster:
    """Fake servers, and the transport to them."""

    def __init__(self, stack: AsyncExitStack, model: Path) -> None:
        self._stack, self._model = stack, ModelShape.from_directory(model)
        self.urls: list[str] = []
        self.processes: dict[str, psutil.Process] = {}
        self.sent = 0  # bytes that left the learner
        self.carrier = Distributed("127.0.0.1", lambda to: bench.RelayHead(to, 1e9, self._count))
        self._transport = SGLangTransport(self.carrier, model, "float32")
        self.http = Http()
        stack.push_async_callback(self.http.close)

    def _count(self, sent: int) -> None:
        self.sent += sent

    async def start(self, number: int = 1, faulty: int = -1, **script: Any) -> list[str]:
        """``number`` servers, of which the one at place ``faulty`` follows the script."""
        scripts = [Behaviour(1e9, DEADLINE_S, **(script if i == faulty else {})) for i in range(number)]
        starts = [server("system.bench.fake_sglang", standard_input=orjson.dumps(asdict(s))) for s in scripts]
        self.processes |= dict(await asyncio.gather(*map(self._stack.enter_async_context, starts)))
        self.urls = [*self.processes]
        return self.urls[-number:]

    def kill(self, url: str) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.processes.pop(url).kill()
        self.urls.remove(url)

    def weights(self, version: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(version)
        return {n: torch.randn(s, generator=generator) for n, s in self._model.tensors().items()}

    async def push(self, version: int, *urls: str) -> PushReport:
        weights = self.weights(version)
        buckets = [{n: weights[n] for n in list(weights)[i::BUCKETS]} for i in range(BUCKETS)]
        began = time.monotonic()
        report = await self._transport.push(self.http, [*urls] or self.urls, buckets, version, "recompute")
        assert time.monotonic() - began < 60
        return report

    async def states(self) -> dict[str, tuple[str, bool]]:
        """URL -> (version, paused) of the servers that answer."""
        found: dict[str, tuple[str, bool]] = {}
        for url in self.urls:
            try:
                info = await self.http.call(f"{url}/server_info", None, 5)
            except protocol.EngineError:
                continue
            found[url] = (info["weight_version"], info["paused"])
        return found


@pytest.fixture
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    (tmp_path / "config.json").write_text(json.dumps(bench.SHAPE | {"hidden_size": 64, "head_dim": 16}))
    monkeypatch.setattr(distributed, "GROUP_DEADLINE_S", DEADLINE_S)
    monkeypatch.setattr(distributed, "ANSWER_S", 4.0)
    monkeypatch.setattr(protocol, "PAUSE_DEADLINE_S", 5.0)
    monkeypatch.setattr(protocol, "LOOK_DEADLINE_S", 5.0)
    async with AsyncExitStack() as stack:
        yield Cluster(stack, tmp_path)


async def test_a_bucket_leaves_the_learner_once(cluster: Cluster) -> None:
    """Whatever the number of servers; and the group lasts from one update to the next."""
    await cluster.start(3)
    groups = list[Any]()
    for version in (1, 2):
        cluster.sent = 0
        report = await cluster.push(version)
        assert not report.failures
        assert cluster.sent == report.bytes
        assert await cluster.states() == dict.fromkeys(cluster.urls, (str(version), False))
        groups.append(cluster.carrier._group)
    assert groups[0] is groups[1]


FAULTS = {
    "dies when it is invited": ("die", "init_weights_update_group", 1),
    "hangs when it is invited": ("hang", "init_weights_update_group", 1),
    "refuses the invitation": ("refuse", "init_weights_update_group", 1),
    "dies between staging and swap": ("die", "pause_generation", 1),
    "hangs between staging and swap": ("hang", "pause_generation", 1),
    "dies once it is paused": ("die", "begin_weight_update", 1),
    "dies before a bucket": ("die", UPDATE, 2),
    "hangs in the middle of a bucket": ("hang", UPDATE, 2),
    "refuses a bucket": ("refuse", UPDATE, 2),
    "refuses the last bucket": ("refuse", UPDATE, BUCKETS),
    "dies before the proof": ("die", "weights_checker", 1),
}


@pytest.mark.parametrize(
    ("what", "place"),
    [(what, place) for what, fault in FAULTS.items() for place in ((0, 1, 2) if UPDATE in fault else (1,))],
)
async def test_one_servers_fault_costs_no_other_its_update(cluster: Cluster, what: str, place: int) -> None:
    fault, path, call = FAULTS[what]
    await cluster.start(3, place, fault=fault, path=path, call=call)
    bad = cluster.urls[place]
    report = await cluster.push(1)
    assert list(report.failures) == [bad], report.failures
    states = await cluster.states()
    good = [url for url in cluster.urls if url != bad]
    assert {url: states[url] for url in good} == dict.fromkeys(good, ("1", False))
    if bad in states:  # it may hold a part of them
        assert states[bad] == ("0", path not in ("init_weights_update_group", "pause_generation"))
    cluster.kill(bad)
    # Another takes its place: brought up alone, then with all.
    (new,) = await cluster.start()
    assert not (await cluster.push(1, new)).failures
    assert not (await cluster.push(2)).failures
    assert await cluster.states() == dict.fromkeys(cluster.urls, ("2", False))


async def test_a_server_that_stands_still_and_comes_back_takes_the_next_update(cluster: Cluster) -> None:
    await cluster.start(3)
    assert not (await cluster.push(1)).failures
    frozen = cluster.processes[cluster.urls[1]]
    os.kill(frozen.pid, signal.SIGSTOP)
    try:
        report = await cluster.push(2)
        assert list(report.failures) == [cluster.urls[1]]
    finally:
        os.kill(frozen.pid, signal.SIGCONT)
    assert {state[0] for state in (await cluster.states()).values()} == {"1", "2"}
    assert not (await cluster.push(3)).failures
    assert await cluster.states() == dict.fromkeys(cluster.urls, ("3", False))


async def test_a_server_that_joins_takes_part_in_the_next_update(cluster: Cluster) -> None:
    """Meanwhile: while the others are being updated, and brought up alone after it, as the monitor does."""
    before = await cluster.start(2)
    push = asyncio.create_task(cluster.push(1, *before))
    (new,) = await cluster.start()
    assert not (await push).failures
    assert (await cluster.states())[new] == ("0", False)
    assert not (await cluster.push(1, new)).failures
    cluster.sent = 0
    report = await cluster.push(2)
    assert not report.failures
    assert cluster.sent == report.bytes
    assert await cluster.states() == dict.fromkeys(cluster.urls, ("2", False))


async def test_an_update_that_is_given_up_leaves_no_group_behind(cluster: Cluster) -> None:
    """The learner's own deadline may strike in the middle of a bucket."""
    await cluster.start(2, 1, fault="hang", path=UPDATE, call=2)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await cluster.push(1)
    assert not cluster.carrier._staged
    report = await cluster.push(2, cluster.urls[0])
    assert not report.failures
    assert (await cluster.states())[cluster.urls[0]] == ("2", False)


async def test_whoever_waits_for_a_member_is_freed_when_the_group_is_given_up() -> None:
    """With gloo, which would wait for the minute of its own."""
    listening = distributed.socket.create_server(("127.0.0.1", 0))
    wire = distributed.TorchGroup(distributed.Invitation(listening, "127.0.0.1", 2, "given-up", "gloo"))
    joining = asyncio.create_task(asyncio.to_thread(wire.join))
    await asyncio.sleep(0.5)
    assert not joining.done()
    wire.close()
    with pytest.raises(RuntimeError):
        await asyncio.wait_for(joining, 60)


def test_the_group_is_not_split_off_the_learners_world(
    monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]
) -> None:
    """A split takes all ranks of the world, and only rank 0 is here: NCCL would wait for ever."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    asked: list[dict[str, Any]] = []
    build = c10d._new_process_group_helper

    def helper(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs)
        return build(*args, **kwargs)

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        assert dist.group.WORLD.bound_device_id is None
        monkeypatch.setattr(c10d, "_new_process_group_helper", helper)
        listening = distributed.socket.create_server(("127.0.0.1", 0))
        wire = distributed.TorchGroup(distributed.Invitation(listening, "127.0.0.1", 1, "test", "gloo"))
        wire.join()
        (kwargs,) = asked
        assert kwargs.get("device_id") is None
        wire.broadcast(torch.zeros(3, dtype=torch.uint8))
        wire.close()
    finally:
        dist.destroy_process_group()
