"""How much the learner gains by training on trees: the same leaves as packed trees and as flat paths, in one
run.

For each sharing ratio the two are timed alternately on the same model, so that other load on the machine
falls on both. The ideal is the ratio of their token counts; what is missing from it is attention (shared
tokens are the cheap, early ones), gathers, and the optimizer step.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from system.bench.random_model import forked_tree, random_model
from system.bench.report import Report
from system.config import Config
from system.tasks.tiny_model import tiny_config
from system.tree.pack import flatten, pack_share
from system.tree.record import Tree, token_node
from system.tree.stats import TreeStats

PATH_TOKENS = 256  # per leaf, prompt included
VOCAB = 512


@dataclass(frozen=True)
class Case:
    """A prompt and a first turn shared by all leaves, then one fork: ``prefix`` of each path is shared."""

    prefix: float
    leaves: int


@dataclass(frozen=True)
class Timing(Case):
    tree_tokens: int
    flat_tokens: int
    tree_s: float  # median seconds of one training step
    flat_s: float
    ideal: float  # flat tokens / tree tokens
    speedup: float  # median of flat seconds / tree seconds
    logprob_error: float  # largest difference of a trained token's log-probability between the two


CASES = tuple(Case(prefix, leaves) for prefix in (0.1, 0.5, 0.8) for leaves in (4, 8, 16))
QUICK_CASES = (Case(0.1, 4), Case(0.8, 8))


def run(out_dir: Path, quick: bool = False) -> dict[str, Any]:
    """Measure, print a table, and write ``learner.json``, ``.png`` and ``.html`` to ``out_dir``.

    One rank (TP = DP = 1) on the default model shape; must be the only learner in its process.
    """
    config = Config()
    config.learn.tp = config.learn.dp = 1
    config.learn.lr = 0.0  # every step sees the same weights
    config.learn.weight_decay = 0.0
    config.learn.objective.name = "ppo"
    cases, leaves, rounds = (QUICK_CASES, 16, 2) if quick else (CASES, 64, 5)
    results = _measure(config, cases, leaves, rounds)
    report = {
        "path_tokens": PATH_TOKENS,
        "micro_tokens": config.learn.micro_tokens,
        "model": asdict(config.model),
        "results": [asdict(r) for r in results],
    }
    return _write(out_dir, report, results)


def _measure(config: Config, cases: tuple[Case, ...], leaves: int, rounds: int) -> list[Timing]:
    from system.learn.batch import BatchPlanner
    from system.learn.trainer import Trainer

    with tempfile.TemporaryDirectory() as directory:
        random_model(Path(directory), tiny_config(config.model, VOCAB, eos_token_id=0), seed=0)
        trainer = Trainer(config, directory, rank=0, world=1, init_method=f"file://{directory}/meeting-point")
        try:
            results = []
            for case in cases:
                rng = np.random.default_rng(0)
                trees = [grown(case, rng) for _ in range(max(1, leaves // case.leaves))]
                paths = [path for tree in trees for path in flatten(tree)]
                error = _disagreement(trees, trainer.logprobs(trees), trainer.logprobs(paths))
                seconds: dict[bool, list[float]] = {False: [], True: []}  # by whether the paths are flat
                for turn in range(rounds + 1):
                    for flat, times in seconds.items():
                        started = time.perf_counter()
                        plan = BatchPlanner(config, flat=flat).plan([TreeStats.of(tree) for tree in trees])
                        trainer.train(plan, pack_share(plan, 0, dict(enumerate(trees))), version=0)
                        if turn:  # the first of each warms up
                            times.append(time.perf_counter() - started)
                tree_tokens, flat_tokens = (sum(t.n_tokens for t in group) for group in (trees, paths))
                pairs = list(zip(*seconds.values(), strict=True))  # taken one after the other
                results.append(
                    Timing(
                        **asdict(case),
                        tree_tokens=tree_tokens,
                        flat_tokens=flat_tokens,
                        tree_s=statistics.median(tree for tree, _ in pairs),
                        flat_s=statistics.median(flat for _, flat in pairs),
                        ideal=flat_tokens / tree_tokens,
                        speedup=statistics.median(flat / tree for tree, flat in pairs),
                        logprob_error=error,
                    )
                )
            return results
        finally:
            trainer.close()


def grown(case: Case, rng: np.random.Generator) -> Tree:
    """A random tree: a prompt, a shared MODEL turn as long, then one MODEL branch per leaf."""
    shared = round(PATH_TOKENS * case.prefix)
    return forked_tree(shared, PATH_TOKENS - shared, case.leaves, VOCAB, rng)


def _disagreement(trees: list[Tree], packed: list[np.ndarray], flat: list[np.ndarray]) -> float:
    worst, number = 0.0, 0
    for tree, values in zip(trees, packed, strict=True):
        for leaf in range(tree.n_leaves):
            index = np.flatnonzero(np.isin(token_node(tree), tree.path(leaf)))
            worst = max(worst, float(np.abs(values[index][1:] - flat[number][1:]).max()))
            number += 1
    return worst


def _write(out_dir: Path, data: dict[str, Any], results: list[Timing]) -> dict[str, Any]:
    page = Report(
        out_dir,
        "learner",
        "Training step: packed trees against flattened paths",
        "The same leaves trained as packed trees and as flat paths, timed alternately on one model. "
        "The ideal is the ratio of their token counts.",
    )
    page.table(
        f"One training step ({PATH_TOKENS} tokens per path)",
        ["prefix", "leaves", "flat tok", "tree tok", "flat s", "tree s", "speed-up", "ideal", "of it"],
        [
            [
                *(f"{r.prefix:.0%}", r.leaves, r.flat_tokens, r.tree_tokens, r.flat_s, r.tree_s),
                *(r.speedup, r.ideal, f"{r.speedup / r.ideal:.0%}"),
            ]
            for r in results
        ],
    )
    worst = max(r.logprob_error for r in results)
    page.text(f"Largest log-probability difference between the two: {worst:.1e} nats.")
    page.figure("learner", _plot(results), "Speed-up over the ratio of token counts; dashed: ideal")
    return page.finish(data)


def _plot(results: list[Timing]) -> Figure:
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    top = max(max(r.ideal, r.speedup) for r in results) * 1.05
    axes.plot([1, top], [1, top], color="0.7", linestyle="--", label="ideal: flat / tree tokens")
    for leaves in sorted({r.leaves for r in results}):
        group = [r for r in results if r.leaves == leaves]
        ideal, speedup = [r.ideal for r in group], [r.speedup for r in group]
        axes.plot(ideal, speedup, marker="o", label=f"{leaves} leaves per tree")
    axes.set_xlabel("tokens on flat paths / tokens in trees")
    axes.set_ylabel("time on flat paths / time on trees")
    axes.set_title("One training step, measured alternately")
    axes.legend()
    return figure
