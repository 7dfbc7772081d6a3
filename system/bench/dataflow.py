"""What a training batch costs on its way to the learner: trees sent to everyone, against statistics sent to
everyone and trees only to the rank that trains on them.

No processes and no network: the bytes are those of the pickles that would travel, the memory is what they
take once read, and the seconds are CPU time of one rank's own work.
"""

from __future__ import annotations

import pickle
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from system.bench.report import Report
from system.config import Config
from system.learn.batch import BatchPlanner
from system.tree.builder import TreeBuilder
from system.tree.pack import pack_share
from system.tree.record import ForkDecision, Kind, Origin, Outcome, ToolCall, Tree
from system.tree.stats import TreeStats

RANKS = 8  # data-parallel
LEAVES = 16
PROMPT, THOUGHT, RESULT, ANSWER, TURNS = 500, 300, 200, 500, 10  # tokens of each: 6,000 on every path
RESPONSE = TURNS * (THOUGHT + RESULT) + ANSWER
MICRO_TOKENS = (32_768, 131_072)  # rows in which these trees are cut into two or three parts, or whole


@dataclass(frozen=True)
class BatchCost:
    """Of one batch; pairs are the least and the most over the ranks."""

    way: str
    micro_tokens: int
    driver_mb: float  # in the driver's memory
    fetched_mb: tuple[float, float]  # received by a rank
    plan_s: float  # credit, weights and plan of the whole batch, on every rank
    pack_s: tuple[float, float]  # rows made by a rank


def run(out_dir: Path, quick: bool = False) -> dict[str, Any]:
    """Measure, print a table, and write ``dataflow.json`` and ``.html`` to ``out_dir``."""
    rng = np.random.default_rng(0)
    trees = [grown(number, rng) for number in range(8 if quick else 64)]
    costs = [cost for micro_tokens in MICRO_TOKENS for cost in measure(trees, micro_tokens)]
    page = Report(
        out_dir,
        "dataflow",
        "A training batch on its way to the learner",
        f"{len(trees)} prompts × {LEAVES} leaves × {PROMPT + RESPONSE} tokens, "
        f"{sum(tree.n_tokens for tree in trees):,} tokens in trees, {RANKS} simulated data-parallel ranks.",
    )
    page.table(
        "One batch; fetched, planned and packed by each rank",
        ["", "row tokens", "driver MB", "fetched MB", "plan CPU s", "pack CPU s"],
        [
            [c.way, c.micro_tokens, c.driver_mb, _spread(c.fetched_mb), c.plan_s, _spread(c.pack_s)]
            for c in costs
        ],
    )
    return page.finish({"prompts": len(trees), "ranks": RANKS, "costs": [asdict(cost) for cost in costs]})


def measure(trees: Sequence[Tree], micro_tokens: int) -> tuple[BatchCost, BatchCost]:
    """Everything everywhere, and each rank its own."""
    config = Config()
    config.learn.micro_tokens, config.rollout.max_response_tokens = micro_tokens, RESPONSE
    planner = BatchPlanner(config, flat=False, dp=RANKS)
    stats = [TreeStats.of(tree) for tree in trees]
    tree_pickles, stats_pickles = ([pickle.dumps(one, 5) for one in many] for many in (trees, stats))
    began = time.process_time()
    plan = planner.plan(stats)
    plan_s = time.process_time() - began
    pack_s: list[float] = []
    for rank in range(RANKS):
        began = time.process_time()
        pack_share(plan, rank, dict(enumerate(trees)))
        pack_s.append(time.process_time() - began)
    told = sum(map(len, stats_pickles)) / 1e6
    own = [told + sum(len(tree_pickles[i]) for i in plan.trees(rank)) / 1e6 for rank in range(RANKS)]
    whole = sum(map(len, tree_pickles)) / 1e6
    # Every rank used to pack the rows of all ranks and to keep its own.
    rows = sum(pack_s)
    before = (_held_mb(tree_pickles), (whole, whole), plan_s, (rows, rows))
    after = (_held_mb(stats_pickles), (min(own), max(own)), plan_s, (min(pack_s), max(pack_s)))
    return (
        BatchCost("all trees to all", micro_tokens, *before),
        BatchCost("each tree to its ranks", micro_tokens, *after),
    )


def grown(number: int, rng: np.random.Generator) -> Tree:
    """A tree of ``LEAVES`` paths of thoughts and tool results; about half of them fork off an earlier one."""
    growth = TreeBuilder(f"q{number}", "bench", rng.integers(0, 150_000, PROMPT), budget=LEAVES)
    tools: list[tuple[int, int]] = []  # (TOOL node, turns before its end) to fork at
    for _ in range(LEAVES):
        node, turns, origin = growth.prompt, 0, Origin.ROOT
        if tools and rng.random() < 0.5:
            (node, turns), origin = tools[int(rng.integers(len(tools)))], Origin.FORK
            growth.fork(ForkDecision(node, 0.1, 0.5, 0.2, 1))
        for turn in range(turns, TURNS):
            thought = growth.node(node, Kind.MODEL)
            _extend(growth, thought, THOUGHT, rng)
            node = growth.node(thought, Kind.TOOL)
            growth.extend(node, rng.integers(0, 150_000, RESULT))
            growth.call(ToolCall(node, "search", {"query": "x" * 60}, "ok", 0.8))
            tools.append((node, turn + 1))
        answer = growth.node(node, Kind.MODEL)
        _extend(growth, answer, ANSWER, rng)
        reward = float(rng.random() < 0.5)
        growth.score(growth.leaf(answer, Outcome.STOPPED, origin), reward, reward > 0)
    return growth.close(1.0)


def _extend(growth: TreeBuilder, node: int, n: int, rng: np.random.Generator) -> None:
    logprob = -rng.random(n).astype(np.float32)
    growth.extend(node, rng.integers(0, 150_000, n), logprob, rng.random(n).astype(np.float32), 3)


def _held_mb(pickles: Sequence[bytes]) -> float:
    """Memory of what the pickles hold."""
    tracemalloc.start()
    held = [pickle.loads(one) for one in pickles]
    current, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(held) == len(pickles)
    return current / 1e6


def _spread(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.3g}" if pair[0] == pair[1] else f"{pair[0]:.3g} to {pair[1]:.3g}"
