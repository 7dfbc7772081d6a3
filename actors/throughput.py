"""Benchmark of whole runs: the same model, engine, tools and prompts under every way to run.

Real actors and real HTTP on this machine.  One set of them serves all runs: the learner's step size is so
small that the weights stay the ones of a short warm start, so every run meets the same agent.  The search
tool answers after a drawn latency that follows from the query alone.  A run trains a few batches; reported
are trained tokens per second, trees per hour, goodput, what engine and learner waited for, staleness, and
the tail of tree completion.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.conductor import Conductor
from actors.inputs import demonstrations, start_weights
from actors.placement import Placement
from actors.ray_support import ray_session
from actors.rollout_pool import RolloutPool, RunActors, check_tools, rollout_worker
from system.bench.latency import ToolLatency
from system.bench.slow_search import slowed
from system.config import Config, load
from system.engine.control import EngineControl
from system.observe.jsonl import read_jsonl
from system.observe.progress import Progress
from system.observe.recorder import Recorder
from system.observe.rundir import RunDir
from system.observe.sinks import JsonlSink
from system.tasks.base import HasCorpus, Task
from system.tasks.registry import make_task
from system.tools.search_index import Document, SearchIndex
from system.tools.search_server import create_app
from system.tools.serving import serve
from system.tree.record import Tree
from system.tree.store import read_trees

QUIET_S = 30.0  # for an engine to end what a run has left
MEAN_S = 0.1  # of a tool call without stragglers; everything else is as small as the model

BASE = (
    "run.steps=6",  # of an asynchronous run's last batches the slowest trees are never seen: not too few
    "task.train_size=512",
    "warmstart.steps=150",
    "warmstart.demos=1024",
    "warmstart.batch=16",
    "warmstart.lr=1e-2",
    "rollout.leaves=8",
    "rollout.roots=4",
    "rollout.concurrency=64",
    "rollout.max_response_tokens=160",
    "rollout.max_tool_result_tokens=48",
    "branching.probe_tokens=4",
    "tools.search_top_k=2",
    "tools.cache_size=0",  # or a run would find the answers of the one before
    "tools.concurrency=512",
    "tools.deadline_s=60",
    "engine.max_context=256",
    "engine.max_running=64",
    "flow.batch_leaves=64",
    "learn.tp=1",
    "learn.lr=1e-12",
    "learn.weight_decay=0",
    "checkpoint.every=0",
    "observe.wandb=disabled",
)
MODES = {
    "lockstep": ("rollout.schedule=lockstep", "branching=arpo", "flow.staleness=0"),
    "tree sync": ("branching=arpo", "flow.staleness=0"),
    "tree async η=1": ("branching=arpo", "flow.staleness=1"),
    "tree async η=4": ("branching=arpo", "flow.staleness=4"),
    "linear sync": ("branching=none", "flow.staleness=0"),
    "linear one-step-off": ("branching=none", "flow.staleness=1", "flow.update=drained"),
    "linear async η=4": ("branching=none", "flow.staleness=4"),
}
QUICK_MODES = ("lockstep", "tree async η=1")


class SlowSearch:
    """The search server, whose answers come after a latency that can be changed between runs."""

    def __init__(self, task: HasCorpus) -> None:
        self.latency = ToolLatency(MEAN_S)
        index = SearchIndex.build(Document(**row) for row in task.corpus())
        self.app = slowed(create_app(index), lambda query: self.latency.draw(zlib.crc32(query)))


@dataclass(frozen=True)
class Stage:
    """What all runs share."""

    task: Task
    model: Path
    actors: RunActors  # its own worker and queue are the warm start's
    config: Config

    @property
    def engine(self) -> EngineControl:
        (url,) = self.actors.pool.engines
        return EngineControl(url)


def measure(out_dir: Path, quick: bool) -> dict[str, Any]:
    """All runs; ``quick`` makes two.  Their directories are left in ``out_dir/runs``.

    Returns ``runs``, one dictionary of figures per latency and mode, and the settings.
    """
    with ray_session(_config((), out_dir, "")) as joined:
        return asyncio.run(_measure(out_dir, joined, quick))


def latencies(quick: bool) -> list[ToolLatency]:
    late = ToolLatency(MEAN_S, 1.0, 0.05)
    return [late] if quick else [*(ToolLatency(MEAN_S, sigma) for sigma in (0.0, 0.5, 1.0, 1.5)), late]


def _config(overrides: Sequence[str], out_dir: Path, search_url: str) -> Config:
    where = (f"run.dir={out_dir / 'runs'}", f"tools.search_url={search_url}")
    return load(None, [*BASE, *where, *overrides])


async def _measure(out_dir: Path, joined: bool, quick: bool) -> dict[str, Any]:
    modes = QUICK_MODES if quick else tuple(MODES)
    steps = ("run.steps=2", "warmstart.steps=80") if quick else ()
    async with AsyncExitStack() as stack:
        task = make_task(_config(steps, out_dir, ""))
        assert isinstance(task, HasCorpus)
        search = SlowSearch(task)
        server = await serve(search.app)
        stack.push_async_callback(server.close)
        stage = await _set_up(_config(steps, out_dir, server.url), task, joined)
        stack.push_async_callback(stage.actors.close)
        configs = {mode: _config((*steps, *MODES[mode]), out_dir, server.url) for mode in modes}
        pool = stage.actors.pool
        workers = {
            mode: rollout_worker(config, f"rollout: {mode}", str(stage.model), pool.engines, pool.tools)
            for mode, config in configs.items()
        }
        await check_tools(workers.values())
        rows: list[dict[str, Any]] = []
        for search.latency in latencies(quick):
            for mode in modes:
                row = await _run(stage, configs[mode], workers[mode])
                rows.append({"mode": mode, "latency": str(search.latency), **row})
                print(f"{search.latency}: {mode}: {row['trained_per_s']:.0f} trained tokens/s", flush=True)
    return {"runs": rows, "settings": list(BASE), "modes": {mode: list(MODES[mode]) for mode in modes}}


async def _set_up(config: Config, task: Task, joined: bool) -> Stage:
    """Start the actors and teach the model to call its tools."""
    run_dir = RunDir.create(config, "warm-start")
    model = start_weights(config, run_dir)
    places = await Placement.claim(config, joined=joined)
    actors = await RunActors.start(config, task, model, places, run_dir)
    recorder = Recorder(run_dir, config, [])
    conductor = Conductor(config, actors, task, run_dir, recorder, _progress(config, recorder))
    await conductor.warm_start(demonstrations(config, task, model))
    return Stage(task, model, actors, config)


def _progress(config: Config, recorder: Recorder) -> Progress:
    """One that is never drawn."""
    return Progress(recorder.status, total_steps=config.run.steps, interval_s=3600.0)


async def _run(stage: Stage, config: Config, worker: Any) -> dict[str, Any]:
    """One run of ``config``, from version 0, on the stage's engine and learner."""
    pool = stage.actors.pool
    own = RolloutPool([worker], pool.engines, pool.hosts, pool.servers, pool.tools)
    run_dir = RunDir.create(
        config, f"{config.branching.name}-{config.rollout.schedule}-{config.flow.staleness}"
    )
    recorder = Recorder(run_dir, config, [JsonlSink(run_dir.metrics_path)])
    actors = RunActors(own, stage.actors.learner)
    conductor = Conductor(config, actors, stage.task, run_dir, recorder, _progress(config, recorder))
    engine = stage.engine
    try:
        await conductor.bring_up()
        before = (await engine.info()).counters
        began, began_unix = time.monotonic(), time.time()
        await conductor.run()
        wall = time.monotonic() - began
        after = (await engine.info()).counters
        await _quiet(engine)
    finally:
        await engine.close()
    summary = recorder.finish()
    steps = [row for row in read_jsonl(run_dir.metrics_path) if "tokens/trained" in row or "version" in row]
    return _figures(
        summary, list(read_trees(run_dir.trees)), before, after, wall, steps[-1]["time"] - began_unix
    )


async def _quiet(engine: EngineControl) -> None:
    """Return once the engine does nothing any more: the next run starts on an idle one."""
    async with asyncio.timeout(QUIET_S):
        while (info := await engine.info()).running or info.waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def _figures(
    summary: dict[str, Any],
    trees: Sequence[Tree],
    before: dict[str, float],
    after: dict[str, float],
    wall_s: float,
    trained_s: float,
) -> dict[str, Any]:
    """``trees``: those trained on; ``wall_s``: of the whole run; ``trained_s``: to its last training step."""
    growth = np.array([tree.closed_s - tree.started_s for tree in trees])
    sampled = sum(int((tree.version >= 0).sum()) for tree in trees)
    dropped = summary["tokens"]["generated"] - sampled if summary["dropped"] else 0
    idle = {
        cause.removeprefix("idle_").removesuffix("_s"): (after[cause] - before.get(cause, 0.0)) / wall_s
        for cause in after
        if cause.startswith("idle_")
    }
    learner = {cause: seconds / wall_s for cause, seconds in summary["idle_s"].get("learner", {}).items()}
    return {
        "wall_s": wall_s,
        "trained_per_s": summary["tokens"]["trained"] / trained_s,
        "trees_per_h": len(trees) / trained_s * 3600,
        "goodput": summary["tokens"]["trained"] / max(sampled + dropped, 1),
        "engine_idle": idle,
        "learner_idle": learner,
        "staleness_mean": summary["staleness"]["mean"],
        "staleness_max": summary["staleness"]["max"],
        "tree_s_median": float(np.median(growth)),
        "tree_s_p95": float(np.quantile(growth, 0.95)),
        "tree_s_max": float(growth.max()),
        "trees": len(trees),
        "leaves": summary["leaves"],
        "tool_calls": sum(len(tree.calls) for tree in trees),
        "dropped": summary["dropped"],
    }
