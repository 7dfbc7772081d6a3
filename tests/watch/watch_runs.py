"""Run directories to look at, with trees of several shapes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from system.config import Config
from system.observe.jsonl import JsonlWriter
from system.observe.rundir import RunDir
from system.tree.record import ForkDecision, Kind, Origin, Outcome, ToolCall, Tree
from system.tree.store import TreeWriter

NAN = float("nan")


def forked_tree(
    prompt_id: str = "q1", reward: tuple[float, float] = (1.0, 0.0), version: int = 3, task: str = "lookup"
) -> Tree:
    """A root that forks after its tool call::

    0 PROMPT 4 ─ 1 MODEL 3 ─ 2 TOOL 2 ┬─ 3 MODEL 2   leaf 0
                                      └─ 4 MODEL 5   leaf 1 (fork)
    """
    lengths, kinds = [4, 3, 2, 2, 5], [Kind.PROMPT, Kind.MODEL, Kind.TOOL, Kind.MODEL, Kind.MODEL]
    model = np.repeat(np.array(kinds) == Kind.MODEL, lengths)
    total = sum(lengths)
    rewards = np.array(reward, np.float32)
    return Tree(
        prompt_id=prompt_id,
        task=task,
        tokens=np.arange(total, dtype=np.int32),
        logprob=np.where(model, -0.5, 0.0).astype(np.float32),
        entropy=np.where(model, np.linspace(0.0, 1.5, total), NAN).astype(np.float32),
        version=np.where(model, version, -1).astype(np.int32),
        start=np.cumsum([0, *lengths[:-1]]).astype(np.int32),
        parent=np.array([-1, 0, 1, 2, 2], np.int32),
        kind=np.array(kinds, np.int8),
        leaf=np.array([3, 4], np.int32),
        reward=rewards,
        correct=(rewards > 0.5).astype(np.int8),
        outcome=np.array([Outcome.STOPPED, Outcome.LENGTH], np.int8),
        origin=np.array([Origin.ROOT, Origin.FORK], np.int8),
        calls=(ToolCall(2, "search", {"query": "who"}, "ok", 0.25, cached=True, attempts=2),),
        forks=(ForkDecision(2, 0.125, 0.525, 0.31, 1),),
        budget=2,
        started_s=1000.0 + version,
        closed_s=1002.5 + version,
        meta={"question": "Who wrote it?", "gold": ["Ada"], "seconds": {"engine": 1.5, "tool": 0.25}},
    )


def timed_tree() -> Tree:
    """The same, which says when it grew: its call was made at 1.1 s; the first branch waits for others before
    it writes its answer, at 1.5 s; the fork begins at 2.2 s.
    """
    tree = forked_tree()
    return replace(
        tree,
        calls=(replace(tree.calls[0], began_s=1.1),),
        opened_s=np.array([NAN, 0.0, 1.5, 1.75, 2.2], np.float32),
        first_s=np.array([NAN, 0.5, 1.5, 1.9, 2.4], np.float32),
        last_s=np.array([NAN, 1.0, 1.5, 2.0, 2.5], np.float32),
    )


def made_run(parent: Path, trees: list[Tree], steps: int = 5, name: str = "seen") -> RunDir:
    """A run of ``steps`` steps with these trees, as one leaves it that has stopped."""
    config = Config()
    config.run.dir, config.run.name, config.run.steps = str(parent), name, 10
    run = RunDir.create(config)
    log = JsonlWriter(run.metrics_path)
    before = {
        "eval/accuracy": 0.25,
        "eval/accuracy_low": 0.07,
        "eval/accuracy_high": 0.59,
        "eval/questions": 8,
    }
    of_set = {"eval/set/aime/accuracy": 0.5, "eval/set/aime/calc/accuracy": 0.75}
    log.write({"step": 0, "time": 1000.0, "eval/which": "before", **before, **of_set})
    for step in range(1, steps + 1):
        log.write(record(step))
    log.close()
    events = JsonlWriter(run.events_path)
    events.write({"time": 999.0, "phase": "training", "total": 0})
    events.write({"time": 1001.0, "note": "an engine was slow"})
    events.close()
    with TreeWriter(run.trees, flush_trees=2) as writer:
        for tree in trees:
            writer.append(tree)
    return run


def record(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "version": step,
        "time": 1000.0 + 2 * step,
        "time/window_s": 2.0,
        "rollout/reward": step / 10,
        "time/generated_per_s": 100.0 * step,
        "time/idle_share/learner/no batch": 0.25,
        "time/idle_share/engine-0/paused": 0.5,
    }


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def line(value: dict[str, Any]) -> str:
    return json.dumps(value) + "\n"


def varied(count: int) -> list[Tree]:
    """Trees whose spread, version, task and tool differ."""
    found: list[Tree] = []
    for i in range(count):
        tree = forked_tree(f"q{i}", (1.0, (i % 5) / 4), version=i, task=("calc", "lookup")[i % 2])
        call = replace(tree.calls[0], tool=("search", "python", "")[i % 3])
        found.append(replace(tree, calls=(call,)))
    return found


def contents(root: Path) -> dict[str, tuple[int, int]]:
    """Every file and directory of a run, by size and time: what must not change."""
    return {
        str(path.relative_to(root)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in [root, *root.rglob("*")]
    }
