"""``espalier bench weights``: how long engines stand still for new weights, by how many they are.

Real updates (:mod:`system.engine.weights`) into fake SGLang servers, each a process of its own
(:mod:`system.bench.fake_sglang`), over links of a fixed bandwidth: every server proves by its digests that
it holds what was sent.  Old: a group per server, served one after the other, as until 2026-11.  New: one
group, in which a bucket leaves the learner once.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import orjson
import torch
from matplotlib.figure import Figure
from torch import Tensor

from system.bench.fake_sglang import Behaviour, Relay
from system.bench.processes import server
from system.bench.report import Report
from system.engine.control import Http
from system.engine.weights.base import GROUP_DEADLINE_S, Bucket, size
from system.engine.weights.distributed import Distributed, Invitation
from system.engine.weights.sglang import Carrier, PushTarget, SGLangTransport
from system.models.shape import ModelShape

SERVERS = (1, 2, 4, 8)
UPDATES = 3  # of each case, of which the median is told, after a first that also builds the groups
BUCKET_BYTES = 2 << 20
BYTES_S = 4e6  # of every link: slow enough for the links, not this machine's cores, to be what is measured
SHAPE = {
    "model_type": "qwen3",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class UpdateCost:
    """Medians over the updates of one case."""

    way: str
    servers: int
    pause_s: float  # of the server that stood still longest
    sent: float  # bytes that left the learner, in sizes of the model
    whole_s: float  # of the update, staging included


class RelayHead:
    """The learner's end of a relay, as a :class:`~system.engine.weights.distributed.Wire`."""

    def __init__(self, invitation: Invitation, bytes_s: float, count: Callable[[int], None]) -> None:
        self._to, self._count = invitation, count
        self._relay = Relay(bytes_s, GROUP_DEADLINE_S)

    def join(self) -> None:
        self._relay.lead(self._to.listening, self._to.world)

    def broadcast(self, flat: Tensor) -> None:
        assert self._relay.after is not None
        before = self._relay.after.sent
        self._relay.send(memoryview(flat.numpy()))  # pyright: ignore[reportArgumentType]
        self._count(self._relay.after.sent - before)

    def close(self) -> None:
        self._relay.hang_up()


class OneByOne(Carrier):
    """A group per server; all are paused, and served one after the other."""

    def __init__(self, make: Callable[[], Distributed], urls: Sequence[str]) -> None:
        super().__init__()
        self._own = {url: make() for url in urls}

    def stage(self, bucket: Bucket) -> None:
        for own in self._own.values():
            own.stage(bucket)

    def clear(self) -> None:
        for own in self._own.values():
            own.clear()

    async def connect(self, servers: Sequence[PushTarget]) -> dict[str, str]:
        failures: dict[str, str] = {}
        for one in servers:
            failures |= await self._own[one.url].connect([one])
        return failures

    async def deliver(self, servers: Sequence[PushTarget], flush_cache: bool) -> dict[str, str]:
        failures: dict[str, str] = {}
        for one in servers:
            failures |= await self._own[one.url].deliver([one], flush_cache)
        return failures


def run(out_dir: Path, quick: bool = False) -> dict[str, Any]:
    """Measure, print a table, and write ``weights.json``, ``.png`` and ``.html`` to ``out_dir``."""
    bytes_s, updates = (4 * BYTES_S, 1) if quick else (BYTES_S, UPDATES)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(SHAPE))
        cases = [
            asyncio.run(measure(way, n, Path(scratch), bytes_s, updates)) for n in SERVERS for way in WAYS
        ]
        model = sum(torch.Size(s).numel() * 4 for s in ModelShape.from_directory(scratch).tensors().values())
    page = Report(
        out_dir,
        "weights",
        "Weight updates by the number of servers",
        f"A model of {model / 1e6:.1f} MB in buckets of {BUCKET_BYTES / 1e6:.1f} MB into fake SGLang "
        f"servers, a process each, over links of {bytes_s / 1e6:g} MB/s, in which one model takes "
        f"{model / bytes_s:.2f} s. Every update is proved by the digests of all parameters.",
    )
    page.table(
        "One update",
        ["servers", "way", "pause s", "sent by the learner, models", "whole update s"],
        [[case.servers, case.way, case.pause_s, case.sent, case.whole_s] for case in cases],
        note="pause: of the server that stood still longest, from the call to pause to its going on",
    )
    growth = {way: _pause(cases, way, SERVERS[-1]) / _pause(cases, way, 1) for way in WAYS}
    page.table(f"Pause at {SERVERS[-1]} servers, in pauses at one", list(growth), [[*growth.values()]])
    page.figure("weights", _plot(cases, model), "Pause and bytes by the number of servers")
    return page.finish(
        {
            "model_bytes": model,
            "bytes_s": bytes_s,
            "cases": [asdict(case) for case in cases],
            "growth": growth,
        }
    )


async def measure(way: str, servers: int, model: Path, bytes_s: float, updates: int) -> UpdateCost:
    """``updates`` updates of ``servers`` servers of the model in ``model``.  RuntimeError if one fails."""
    sent = 0

    def count(more: int) -> None:
        nonlocal sent
        sent += more

    def group() -> Distributed:
        return Distributed("127.0.0.1", lambda invitation: RelayHead(invitation, bytes_s, count))

    tensors = ModelShape.from_directory(model).tensors()
    behaviour = orjson.dumps(asdict(Behaviour(bytes_s=bytes_s)))
    async with AsyncExitStack() as stack:
        starts = [server("system.bench.fake_sglang", standard_input=behaviour) for _ in range(servers)]
        urls = [url for url, _ in await asyncio.gather(*map(stack.enter_async_context, starts))]
        http = await stack.enter_async_context(Http())
        carrier = WAYS[way](group, urls)
        transport = SGLangTransport(carrier, model, "float32")
        pauses, sizes, seconds = list[float](), list[float](), list[float]()
        for version in range(updates + 1):
            weights = {name: torch.randn(shape) for name, shape in tensors.items()}
            sent, began = 0, time.perf_counter()
            report = await transport.push(http, urls, buckets(weights), version, "recompute")
            if report.failures:
                raise RuntimeError("; ".join(report.failures.values()))
            seconds.append(time.perf_counter() - began)
            pauses.append(max(report.pause_s.values()))
            sizes.append(sent / report.bytes)
        return UpdateCost(way, servers, median(pauses[1:]), median(sizes[1:]), median(seconds[1:]))


def buckets(weights: Bucket) -> list[Bucket]:
    """The weights in buckets of about :data:`BUCKET_BYTES`."""
    made: list[dict[str, Tensor]] = [{}]
    for name, tensor in weights.items():
        if made[-1] and size(made[-1]) + tensor.nbytes > BUCKET_BYTES:
            made.append({})
        made[-1][name] = tensor
    return [*made]


WAYS: dict[str, Callable[[Callable[[], Distributed], Sequence[str]], Carrier]] = {
    "old": OneByOne,
    "new": lambda group, urls: group(),
}


def _pause(cases: Sequence[UpdateCost], way: str, servers: int) -> float:
    return next(case.pause_s for case in cases if (case.way, case.servers) == (way, servers))


def _plot(cases: Sequence[UpdateCost], model: int) -> Figure:
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for way in WAYS:
        mine = [case for case in cases if case.way == way]
        left.plot([case.servers for case in mine], [case.pause_s for case in mine], marker="o", label=way)
        right.plot([case.servers for case in mine], [case.sent * model / 1e6 for case in mine], marker="o")
    left.set_title("pause (s)")
    right.set_title("sent by the learner (MB)")
    for axes in (left, right):
        axes.set_xlabel("servers")
        axes.set_xticks(SERVERS)
        axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=2)
    return figure
