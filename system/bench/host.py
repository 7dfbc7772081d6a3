"""Benchmark of the rollout host: what one worker process can carry, and what a streamed chunk costs it.

Everything is the real thing but the model: growers with the configured policy, tool service, engine client
and HTTP over loopback, against a stub engine in a process of its own that streams prepared tokens at a given
pace (:mod:`system.bench.stub_engine`).  Trees start as others close, so that the number of live branches
stays at the target.

Reported are CPU microseconds per streamed chunk (all of the process: trees, probes, forks, tools, HTTP), the
events per second that this allows, how late the event loop runs, and memory.  CPU time hardly depends on
what else the machine does; the pace that was kept does.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Hashable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil
from matplotlib.figure import Figure

from system.bench.processes import cpu_s, server
from system.bench.report import Report
from system.bench.stub_engine import Script
from system.config import RolloutConfig, ToolsConfig
from system.engine.pool import EnginePool
from system.engine.protocol import Chunk, GenerateRequest
from system.rollout import process
from system.rollout.branching import Arpo
from system.rollout.context import RolloutContext
from system.rollout.schedule import BarrierFree
from system.rollout.scorer import Scorer
from system.rollout.scoring import Scoring
from system.rollout.syntax.tags import TagSyntax
from system.rollout.tree_rollout import TreeRollout
from system.tasks.quickstart import vocabulary
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec, ToolStatus
from system.tools.service import ToolService
from system.tree.prompt import Prompt
from system.twin.agent import AnswerReward
from system.twin.dist import Lognormal

_TICK_S = 0.02  # of the loop's lateness


@dataclass(frozen=True)
class Load:
    """How much, and how fast."""

    branches: int = 2000  # alive at once
    chunk_tokens: int = 16
    tokens_per_s: float = 16.0  # of each stream
    warm_s: float = 45.0  # until old trees close and new ones start
    measured_s: float = 30.0
    tool_s: float = 1.0  # mean, σ = 1
    leaves: int = 16
    roots: int = 8


@dataclass
class Counts:
    """What happened while counting was on."""

    chunks: int = 0
    tokens: int = 0
    segments: int = 0
    calls: int = 0
    trees: int = 0
    forks: int = 0

    @property
    def events(self) -> int:
        """What the loop was woken for: chunks, ends of calls, starts of segments."""
        return self.chunks + self.calls + self.segments


class _LiveBranches(BarrierFree):
    """Barrier-free, and counts the branches that are alive."""

    def __init__(self) -> None:
        self.live = 0

    async def join(self, branch: Hashable) -> None:
        self.live += 1

    def leave(self, branch: Hashable) -> None:
        self.live -= 1


class _CountedEngine:
    """The client, counting what comes out of it."""

    def __init__(self, client: EnginePool, counts: Counts) -> None:
        self._client, self._counts = client, counts

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk]:
        counts = self._counts
        counts.segments += 1
        async with aclosing(self._client.generate(request)) as chunks:
            async for chunk in chunks:
                counts.chunks += 1
                counts.tokens += len(chunk.tokens)
                yield chunk


class _Search:
    """A tool that only takes its time."""

    spec = ToolSpec(
        "search",
        "look something up",
        {"type": "object", "properties": {"query": {"type": "string"}}},
        "query",
    )

    def __init__(self, latency: Lognormal, counts: Counts) -> None:
        self._latency, self._counts, self._seed = latency, counts, 0

    async def run(self, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        self._seed += 1
        self._counts.calls += 1
        await asyncio.sleep(self._latency.draw(np.random.default_rng(self._seed)))
        return ToolOutcome(ToolStatus.OK, "Bob Stone: 47\nAnn Stone: 16")

    async def check(self) -> None:
        return None


def make_plan(load: Load) -> Script:
    """64 segments of 64 to 256 tokens, of words that the quickstart's tokenizer knows."""
    tokenizer, rng = vocabulary.build(), np.random.default_rng(0)
    pieces = tokenizer.get_vocab().items()
    words = sorted(i for piece, i in pieces if piece.startswith(" ") and piece[1:].isalpha())
    call: list[Any] = list(tokenizer.encode(" <search> done </search>", add_special_tokens=False))
    segments: list[list[int]] = []
    matched: list[str] = []
    for _ in range(64):
        calls = rng.random() < 0.6
        end: list[Any] = call if calls else [tokenizer.eos_token_id]
        segments.append([*rng.choice(words, int(rng.integers(64, 257))).tolist(), *end])
        matched.append("</search>" if calls else "")
    texts = [[str(tokenizer.decode([token])) for token in segment] for segment in segments]
    return Script(segments, texts, matched, load.chunk_tokens, load.tokens_per_s, first_s=0.2)


def stub(plan: Script) -> AbstractAsyncContextManager[tuple[str, psutil.Process]]:
    """The stub engine in a process of its own: its URL, and the process."""
    return server("system.bench.stub_engine", standard_input=orjson.dumps(plan))


async def measure(load: Load) -> dict[str, Any]:
    """Carry ``load`` in this process for a while; see the keys of what it returns."""
    counts = Counts()
    async with stub(make_plan(load)) as (url, engine):
        tools = ToolService(
            [_Search(Lognormal(load.tool_s, 1.0), counts)],
            ToolsConfig(concurrency=load.branches, deadline_s=60),
        )
        client = EnginePool([url], deadline_s=120, in_flight=load.branches)
        live = _LiveBranches()
        context = _context(load, _CountedEngine(client, counts), tools, live)
        rss = psutil.Process().memory_info().rss
        growing = asyncio.create_task(_keep_growing(context, live, load, counts))
        try:
            await asyncio.sleep(load.warm_s)
            return await _watch(load, live, counts, engine, growing, rss)
        finally:
            growing.cancel()
            await asyncio.gather(growing, return_exceptions=True)
            await tools.close()
            await client.close()


def _context(load: Load, engine: _CountedEngine, tools: ToolService, live: _LiveBranches) -> RolloutContext:
    tokenizer = vocabulary.build()
    context = RolloutContext(
        engine=engine,
        tools=tools,
        syntax=TagSyntax(tools.specs),
        policy=Arpo(8, 0.5, 0.2),
        scoring=Scoring([Scorer(AnswerReward())]),
        tokenizer=tokenizer,
        config=RolloutConfig(leaves=load.leaves, roots=load.roots, call_limit=3, max_response_tokens=2048),
        vocab_size=len(tokenizer),
    )
    object.__setattr__(context, "schedule", live)
    return context


async def _keep_growing(context: RolloutContext, live: _LiveBranches, load: Load, counts: Counts) -> None:
    """Start a tree whenever the number of live branches allows it.  Ends only by an error."""
    number = 0

    async def one(number: int) -> None:
        prompt = Prompt(f"p{number}", ({"role": "user", "content": "Q: Bob Stone 's home ?"},), ())
        tree = await TreeRollout(context, prompt, seed=number).run()
        counts.trees += 1
        counts.forks += sum(decision.forks for decision in tree.forks)

    async with asyncio.TaskGroup() as trees:
        while True:
            for _ in range((load.branches - live.live) // load.leaves):
                trees.create_task(one(number))
                number += 1
            await asyncio.sleep(_TICK_S)


def run(out_dir: Path, quick: bool = False) -> dict[str, Any]:
    """Measure, write ``host.json``, ``host.png`` and ``host.html``; returns what the JSON file holds."""
    process.prepare()
    warm, seconds = (10.0, 10.0) if quick else (45.0, 30.0)
    cases = [
        Load(branches, chunk, warm_s=warm, measured_s=seconds)
        for branches, chunk in ((1000, 16), (2000, 16), (2000, 4))
    ]
    report = Report(
        out_dir,
        "host",
        "One rollout worker process under load",
        "The real rollouts, tool service, engine client and HTTP against a stub engine that streams prepared "
        "tokens at a fixed pace.",
    )
    rows = [{**asdict(load), **asyncio.run(measure(load))} for load in cases]
    report.section(
        "What one process carries",
        f"Every branch streams at {cases[0].tokens_per_s:g} tokens per second; segments of 64 to 256 tokens, "
        "60 % of which end in a tool call of a second or so; n = 16, N = 8. A chunk's microseconds include "
        "its share of everything else: requests, forks, tool calls, starting and closing trees.",
        "The process keeps up as long as it needs less than one core and its event loop is not late by more "
        "than a chunk takes to come.",
    )
    report.table(
        "Load and cost",
        list(_COLUMNS),
        [[row[key] for key in _COLUMNS.values()] for row in rows],
        note="late: how long after its time a timer of the event loop fired; a busy machine is late, too",
    )
    report.figure("host", _plot(rows), "CPU per streamed chunk and per streamed token")
    return report.finish({"cases": rows})


_COLUMNS = {
    "branches": "branches",
    "alive (mean)": "alive_mean",
    "tokens per chunk": "chunk_tokens",
    "chunks": "chunks",
    "events/s": "events_per_s",
    "tokens/s": "tokens_per_s_all",
    "CPU µs/chunk": "cpu_us_per_chunk",
    "CPU µs/token": "cpu_us_per_token",
    "cores used": "cpu_share",
    "late ms (median)": "late_ms_median",
    "late ms (p99)": "late_ms_p99",
    "memory MB": "rss_mb",
    "KB/branch": "kb_per_branch",
    "cores of the stub": "stub_cpu_share",
}


def _plot(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8, 3), layout="constrained")
    labels = [f"{row['branches']:,} branches,\n{row['chunk_tokens']} tokens per chunk" for row in rows]
    left, right = figure.subplots(1, 2)
    for axes, part in ((left, "chunk"), (right, "token")):
        axes.barh(labels, [row[f"cpu_us_per_{part}"] for row in rows])
        axes.set_title(f"CPU µs per {part}")
        axes.invert_yaxis()
    right.set_yticks([])
    return figure


async def _watch(
    load: Load,
    live: _LiveBranches,
    counts: Counts,
    engine: psutil.Process,
    growing: asyncio.Task[None],
    rss_before: int,
) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    before, began, used_before, stub_before = replace(counts), loop.time(), os.times(), cpu_s(engine)
    alive: list[int] = []
    late: list[float] = []
    while loop.time() - began < load.measured_s and not growing.done():
        due = loop.time() + _TICK_S
        await asyncio.sleep(_TICK_S)
        late.append(loop.time() - due)
        alive.append(live.live)
    if growing.done():
        growing.result()
    wall, used_now = loop.time() - began, os.times()
    user, kernel = used_now.user - used_before.user, used_now.system - used_before.system
    used = user + kernel
    done = Counts(**{key: value - asdict(before)[key] for key, value in asdict(counts).items()})
    memory = psutil.Process().memory_info().rss
    streaming = load.tokens_per_s * wall  # tokens of a branch that streams all the time
    return {
        "branches": load.branches,
        "alive_mean": float(np.mean(alive)),
        "alive_max": max(alive),
        **asdict(done),
        "wall_s": wall,
        "cpu_s": used,
        "kernel_share": kernel / used,
        "cpu_share": used / wall,
        "stub_cpu_share": (cpu_s(engine) - stub_before) / wall,
        "cpu_us_per_chunk": used / done.chunks * 1e6,
        "user_us_per_chunk": user / done.chunks * 1e6,
        "cpu_us_per_token": used / done.tokens * 1e6,
        "events_per_s": done.events / wall,
        "events_per_cpu_s": done.events / used,
        "streams_mean": done.tokens / streaming,
        "late_ms_median": float(np.median(late)) * 1e3,
        "late_ms_p99": float(np.quantile(late, 0.99)) * 1e3,
        "tokens_per_s_all": done.tokens / wall,
        "rss_mb": memory / 2**20,
        "kb_per_branch": (memory - rss_before) / load.branches / 1024,
    }
