"""``espalier bench judge``: does a slow judge keep the engines waiting?

Whole runs of the quickstart on this machine, in turns: rewarded by a rule alone, and by the rule and a judge
that answers after a second and fails one request in a hundred (:mod:`system.bench.slow_judge`).  The model
and what it is asked are the same: a first run teaches it, and the learner's step size in the others is so
small that its weights stay.  Compared is the share of its time in which the engine waited.

A leaf that waits for its verdict is in flight, and at most (η + 1)·B are: so the comparison is made for
several bounds η of staleness.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

from system.bench.processes import run_to_end
from system.bench.report import Report
from system.bench.slow_judge import create_app
from system.observe.rundir import RunDir
from system.serving import serve

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SECONDS, FAILURES = 1.0, 0.01
RUN_S = 1800.0  # at most, of one run
STEPS, REPEATS = 40, 2
CASES = {f"η = {bound}": f"flow.staleness={bound}" for bound in (1, 2, 4)}

SETTINGS = (
    "task.train_size=2048",
    "rollout.concurrency=64",
    "learn.lr=1e-12",
    "learn.weight_decay=0",
    "eval.questions=1",
    "checkpoint.every=0",
    "observe.wandb=disabled",
    "observe.trees=10",
)
TEACH = ("run.steps=1", "warmstart.steps=150", "warmstart.demos=1024")


def run(out_dir: Path, quick: bool = False) -> dict[str, Any]:
    """Measure, write ``judge.json`` and ``judge.html``; returns what the JSON holds.

    ``quick``: one short pair of runs.  The runs' directories are left in ``out_dir``.
    """
    how = (1, 10, [*CASES][-1:]) if quick else (REPEATS, STEPS, [*CASES])
    return write_report(asyncio.run(_measure(out_dir, *how)), out_dir)


async def _measure(out_dir: Path, repeats: int, steps: int, cases: list[str]) -> dict[str, Any]:
    runs = out_dir / time.strftime("runs-%Y%m%d-%H%M%S")
    runs.mkdir(parents=True)
    settings = [*SETTINGS, f"run.dir={runs}"]
    taught = await _train(runs, "taught", [*settings, *TEACH])
    settings += [f"model.path={taught.model}", "warmstart.steps=0", f"run.steps={steps}"]
    judge = await serve(create_app(SECONDS, FAILURES))
    options = f'{{base_url: "{judge.url}/v1", model: any}}'
    ways = {
        "rule": "reward=arpo",
        "rule and judge": f"reward=[arpo, {{name: judge, deadline_s: 60, options: {options}}}]",
    }
    rows: list[dict[str, Any]] = []
    try:
        for case, (way, reward) in itertools.product(cases * repeats, ways.items()):
            words = [*settings, reward, CASES[case]]
            done = await _train(runs, f"run-{len(rows):02d}", words)
            row = figures(json.loads(done.summary_path.read_bytes()))
            rows.append({"case": case, "way": way, **row})
            print(f"{case}: {way}: engine idle {row['engine_idle']:.1%}", flush=True)
    finally:
        await judge.close()
    about = {"steps": steps, "seconds": SECONDS, "failures": FAILURES}
    return {**about, "runs": rows, "compared": [compared(rows, case) for case in cases]}


async def _train(runs: Path, name: str, settings: list[str]) -> RunDir:
    """One ``espalier train``, to its end.  Raises RuntimeError if it fails, TimeoutError after ``RUN_S``."""
    command = ["actors.cli.main", "train", str(QUICKSTART), *settings, f"run.name={name}"]
    await run_to_end(*command, log=runs / f"{name}.log", limit_s=RUN_S)
    return RunDir.open(runs / name)


def figures(summary: dict[str, Any]) -> dict[str, Any]:
    """Of one run."""
    counted = summary["rewards"]
    return {
        "engine_idle": summary["idle"]["engine-0"],
        "learner_idle": summary["idle"]["learner"],
        "trees": summary["trees"],
        "trees_per_s": summary["trees"] / summary["wall_s"],
        "requests": counted.get("judge/requests", 0.0),
        "retries": counted.get("judge/retries", 0.0),
        "spared": counted.get("judge/cache_hits", 0.0) + counted.get("judge/joins", 0.0),
        "latency_s": counted.get("judge/latency_s", 0.0),
        "failed": sum(count for name, count in counted.items() if name.startswith("failed/")),
        "close_wait_s": counted.get("close_wait_s", 0.0) / max(summary["trees"], 1),
        "wall_s": summary["wall_s"],
    }


def compared(rows: list[dict[str, Any]], case: str) -> dict[str, Any]:
    """Means of the engine's idle share in one case, and by how many points the judge raises it."""
    idle: dict[str, list[float]] = {}
    for row in rows:
        if row["case"] == case:
            idle.setdefault(row["way"], []).append(row["engine_idle"])
    without, beside = (statistics.mean(shares) for shares in idle.values())
    return {"case": case, "without": without, "with": beside, "points": 100 * (beside - without)}


def write_report(result: dict[str, Any], out_dir: Path) -> dict[str, Any]:
    """``result``: as the benchmark returns it."""
    report = Report(
        out_dir,
        "judge",
        "A slow judge beside the rule",
        f"Whole runs of the quickstart on this machine; the judge answers after {result['seconds']:g} s and "
        f"fails {result['failures']:.0%} of its requests.",
    )
    report.section("The engine's idle share", "A leaf that waits for its verdict is in flight.")
    report.table(
        "Without the judge, with it, and the difference in points",
        list(result["compared"][0]),
        [list(row.values()) for row in result["compared"]],
    )
    report.table(
        "Runs, in the order in which they were made",
        list(result["runs"][0]),
        [list(row.values()) for row in result["runs"]],
        note="spared: leaves whose verdict was known or on its way; close_wait_s: per tree, from the end of "
        "its last branch to the last score",
    )
    report.facts({"settings": " ".join(SETTINGS), "steps": str(result["steps"])})
    return report.finish(result)
