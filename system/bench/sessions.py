"""Benchmark of python sessions: what a fork costs, a cell, and the memory of a live session.

Trees as a rollout grows them, of :data:`ROOTS` opened and the others forked one from another, each with a
small state of its own, until so many sessions are alive; all of them go on being alive while forks and cells
are timed.  Memory is counted over all processes of the trees, wardens and first processes included: PSS
shares what is shared, private memory is what would come free with the sessions.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

from system.bench.report import Report
from system.config import ToolsConfig
from system.tools.sandbox.sandbox import Sandbox
from system.tools.sandbox.sessions import SandboxSession, SessionTree

_T = TypeVar("_T")
LEAVES, ROOTS = 16, 4
_STATE = "import collections, random\nwords = [str(random.random()) for _ in range(1000)]\nx = 0"
_CELL = "x += len(words)\nx"
_LARGE = "large = [str(i) * 8 for i in range(300_000)]"


@dataclass
class _Grown:
    """Sessions that are alive, and what it took."""

    trees: list[SessionTree] = field(default_factory=list[SessionTree])
    sessions: list[SandboxSession] = field(default_factory=list[SandboxSession])
    open_ms: list[float] = field(default_factory=list[float])
    fork_ms: list[float] = field(default_factory=list[float])
    cell_ms: list[float] = field(default_factory=list[float])


def run(out: Path, *, quick: bool = False) -> dict[str, Any]:
    """Write ``sessions.json`` and ``sessions.html`` into ``out``; returns the figures."""
    numbers = (1, 40) if quick else (1, 100, 2000)
    rows = [
        asyncio.run(measure(live, packages))
        for packages in ([], ToolsConfig().python_packages)
        for live in numbers
    ]
    large = asyncio.run(_large_state())
    report = Report(
        out, "sessions", "Python sessions", "What a session that forks costs, while others are alive."
    )
    columns = {
        "live_sessions": "live sessions",
        "packages": "loaded",
        "fork_ms_p50": "fork p50, ms",
        "fork_ms_p99": "p99",
        "open_ms_p50": "open p50, ms",
        "cell_ms_p50": "cell p50, ms",
        "cell_ms_p99": "p99",
        "pss_mb": "PSS a session, MB",
        "private_mb": "private, MB",
        "grown_s": "grown in, s",
        "closed_s": "closed in, s",
    }
    report.table(
        "one fork or cell at a time, all sessions alive",
        list(columns.values()),
        [[row[key] for key in columns] for row in rows],
    )
    report.table(
        "a state of 300,000 strings",
        ["fork p50, ms", "memory of the state, MB", "private in a fork, MB", "once the fork has read it, MB"],
        [[large[key] for key in ("fork_ms_p50", "state_mb", "fork_private_mb", "read_private_mb")]],
    )
    return report.finish({"sessions": rows, "large": large})


async def measure(live: int, packages: Sequence[str]) -> dict[str, Any]:
    """Keep ``live`` sessions alive, and time what is done to some of them."""
    box = Sandbox(packages=packages)
    await box.start()
    try:
        began, grown = time.monotonic(), _Grown()
        while len(grown.sessions) < live:
            await _grow(box, grown, min(LEAVES, live - len(grown.sessions)), bool(packages))
        grown_s = time.monotonic() - began
        pss_mb, private_mb = _memory()
        grown.fork_ms.clear()
        rng = random.Random(0)
        for _ in range(200):
            session = rng.choice(grown.sessions)
            await _timed(session.run(_CELL), grown.cell_ms)
            child = await _timed(session.fork(), grown.fork_ms)
            await child.close()
        began = time.monotonic()
        await asyncio.gather(*(tree.close() for tree in grown.trees))
    finally:
        await box.close()
    return {
        "live_sessions": live,
        "packages": ", ".join(packages) or "none",
        **{
            f"{what}_p{share}": float(np.percentile(times, share))
            for what, times in (
                ("fork_ms", grown.fork_ms),
                ("open_ms", grown.open_ms),
                ("cell_ms", grown.cell_ms),
            )
            for share in (50, 99)
        },
        "pss_mb": pss_mb / live,
        "private_mb": private_mb / live,
        "grown_s": grown_s,
        "closed_s": time.monotonic() - began,
    }


async def _grow(box: Sandbox, grown: _Grown, leaves: int, packages: bool) -> None:
    """One tree more."""
    tree = await box.tree(packages=packages)
    grown.trees.append(tree)
    sessions: list[SandboxSession] = []
    for i in range(leaves):
        if i < ROOTS:
            session = await _timed(tree.open(i), grown.open_ms)
            await session.run(_STATE)
        else:
            session = await _timed(sessions[i - ROOTS].fork(), grown.fork_ms)
        await session.run(_CELL)
        sessions.append(session)
    grown.sessions += sessions


async def _large_state() -> dict[str, float]:
    box = Sandbox()
    await box.start()
    try:
        tree = await box.tree()
        session = await tree.open()
        _, before = _memory()
        await session.run(_LARGE)
        _, one = _memory()
        times: list[float] = []
        children = [await _timed(session.fork(), times)]
        _, shared = _memory()  # without the state, which is private to nobody any more
        children += [await _timed(session.fork(), times) for _ in range(20)]
        _, forked = _memory()
        for child in children[:5]:
            await child.run("sum(map(len, large))")
        _, read = _memory()
        await tree.close()
    finally:
        await box.close()
    return {
        "fork_ms_p50": float(np.median(times)),
        "state_mb": one - before,
        "fork_private_mb": (forked - shared) / 20,
        "read_private_mb": (read - forked) / 5,
    }


async def _timed(work: Awaitable[_T], times_ms: list[float]) -> _T:
    began = time.perf_counter()
    done = await work
    times_ms.append((time.perf_counter() - began) * 1e3)
    return done


def _memory() -> tuple[float, float]:
    """PSS and private memory of all processes of trees, MB."""
    pss = private = 0
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name() in ("sandbox-tree", "sandbox-tree-1", "sandbox-session"):
                used = process.memory_full_info()
                pss, private = pss + used.pss, private + used.uss
        except psutil.NoSuchProcess:
            continue
    return pss / 2**20, private / 2**20
