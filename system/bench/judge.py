"""``espalier bench judge``: does a slow judge keep the engines waiting, and if so, what of it?

Whole runs of the quickstart on this machine, in turns: rewarded by a rule alone; by the rule and a judge that
answers at once; by the rule and one that answers after a second and fails one request in a hundred
(:mod:`system.bench.slow_judge`).  The model and what it is asked are the same: a first run teaches it, and
the learner's step size in the others is so small that its weights stay.

The second way costs what a judge's requests cost the processors, its server's work included, which here runs
on the same ones; what the third costs more than the second is its latency.  The digital twin, calibrated on
the first run, says what latency costs where nothing has to share a processor.

A tree that waits for its verdicts is in flight, and at most (η + 1)·B leaves are: so the comparison is made
for several bounds η of staleness, and every run says where its trees in flight were.  By Little's law, those
in one state are, on average, the trees per second times the seconds that each spends in it.

The first steps of a run do not count: its first trees start together, so that their verdicts come together
too, once, however long the run is.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from system.bench.processes import run_to_end
from system.bench.report import Report
from system.bench.slow_judge import create_app
from system.errors import ConfigError
from system.observe.rundir import RunDir
from system.serving import serve
from system.twin.calibrate import Calibration
from system.twin.clock import run as run_virtually
from system.twin.judge import JudgeModel
from system.twin.records import Figures, Records, mean_over_engines, steps_of, total
from system.twin.world import Twin

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SECONDS, FAILURES = 1.0, 0.01
RUN_S = 1800.0  # at most, of one run
FILL = 12  # training steps at the start that do not count: more than the η + 1 batches that start together
STEPS, REPEATS = 52, 2
CASES = {f"η = {bound}": f"flow.staleness={bound}" for bound in (1, 2, 4, 8)}
RULE, AT_ONCE, SLOW = "rule", "judge at once", "slow judge"
JUDGES = {AT_ONCE: (0.0, 0.0), SLOW: (SECONDS, FAILURES)}  # seconds, share that fails

SETTINGS = (
    "task.train_size=2048",
    "rollout.concurrency=64",
    "learn.lr=1e-12",
    "learn.weight_decay=0",
    "eval.questions=1",
    "checkpoint.every=0",
    "observe.wandb=disabled",
    "observe.trees=100",  # which the twin is calibrated on
)
TEACH = ("run.steps=1", "warmstart.steps=150", "warmstart.demos=1024")


def run(out_dir: Path, words: Sequence[str] = (), quick: bool = False) -> dict[str, Any]:
    """Measure, write ``judge.json`` and ``judge.html``; returns what the JSON holds.

    ``words``: the bounds of staleness to measure; none: all of :data:`CASES`.  ``quick``: each way once, for
    the first bound.  The runs' directories are left in ``out_dir``.  Raises :class:`ConfigError` for others.
    """
    cases = [f"η = {word}" for word in words] or [*CASES]
    if unknown := [case for case in cases if case not in CASES]:
        known = ", ".join(case.split()[-1] for case in CASES)
        raise ConfigError(f"bench judge: {unknown[0]} is not measured; bounds of staleness: {known}")
    how = (1, FILL + 12, cases[:1]) if quick else (REPEATS, STEPS, cases)
    return write_report(asyncio.run(_measure(out_dir, *how)), out_dir)


async def _measure(out_dir: Path, repeats: int, steps: int, cases: list[str]) -> dict[str, Any]:
    runs = out_dir / time.strftime("runs-%Y%m%d-%H%M%S")
    runs.mkdir(parents=True)
    settings = [*SETTINGS, f"run.dir={runs}"]
    taught = await _train(runs, "taught", [*settings, *TEACH])
    settings += [f"model.path={taught.model}", "warmstart.steps=0", f"run.steps={steps}"]
    servers = {way: await serve(create_app(*judge)) for way, judge in JUDGES.items()}
    rewards = {RULE: "reward=arpo"} | {way: _rewards(server.url) for way, server in servers.items()}
    rows: list[dict[str, Any]] = []
    done: dict[str, RunDir] = {}  # of each case, its first run by the rule alone
    try:
        for case, way in itertools.product(cases * repeats, rewards):
            served_s = time.process_time()
            one = await _train(runs, f"run-{len(rows):02d}", [*settings, rewards[way], CASES[case]])
            served_s = time.process_time() - served_s
            done.setdefault(case, one)
            summary = json.loads(one.summary_path.read_bytes())
            row = figures(steps_of(one, FILL), summary) | {"server_cpu_s": served_s}
            rows.append({"case": case, "way": way, **row})
            print(f"{case}: {way}: engine idle {row['engine_idle']:.1%}", flush=True)
    finally:
        for server in servers.values():
            await server.close()
    virtual = await asyncio.to_thread(predicted, done, steps)
    about = {"steps": steps, "left_out": FILL, "seconds": SECONDS, "failures": FAILURES}
    return {**about, "runs": rows, "compared": [compared(rows, case, virtual[case]) for case in cases]}


def _rewards(url: str) -> str:
    return f'reward=[arpo, {{name: judge, deadline_s: 60, options: {{base_url: "{url}/v1", model: any}}}}]'


async def _train(runs: Path, name: str, settings: list[str]) -> RunDir:
    """One ``espalier train``, to its end.  Raises RuntimeError if it fails, TimeoutError after ``RUN_S``."""
    command = ["actors.cli.main", "train", str(QUICKSTART), *settings, f"run.name={name}"]
    await run_to_end(*command, log=runs / f"{name}.log", limit_s=RUN_S)
    return RunDir.open(runs / name)


def figures(records: Records, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Of one run.  ``records``: of the training steps that count; ``summary``: of the whole run."""
    found, span, steps = Figures.of(records), total(records, "time/window_s"), len(records)
    trees = total(records, "rollout/trees")
    judged_s = total(records, "reward/close_wait_s")
    learner = found.idle["learner"]
    depths = [one["flow/queue_depth"] for one in records if "flow/queue_depth" in one]
    rows, busy_s, decodes, prefill = (
        total(records, f"engine/server/{name}") for name in ("row_steps", "busy_s", "steps", "prefill_tokens")
    )
    config, counted = summary["config"], summary["rewards"]
    batch = config["flow"]["batch_leaves"] / config["rollout"]["leaves"]
    return {
        "engine_idle": mean_over_engines(found.idle),
        "learner_idle": sum(learner.values()),
        "step_s": found.step_s,
        "trees_per_s": trees / span,
        # Trees in flight, by what they wait for.
        "may_fly": (config["flow"]["staleness"] + 1) * batch,
        "growing": (trees * found.tree_mean_s - judged_s) / span,
        "judged": judged_s / span,
        "queued": statistics.fmean(depths) if depths else None,
        "trained": batch * (1 - learner.get("no batch", 0.0)),
        # The engine's work.
        "tokens_per_busy_s": rows / max(busy_s, 1e-9),
        "rows_per_decode": rows / max(decodes, 1),
        "prefill_per_token": prefill / max(rows, 1),
        "tokens_per_step": rows / steps,
        "untrained": summary["trees"] - summary["versions"] * batch,
        # The judge's.
        "requests": counted.get("judge/requests", 0.0),
        "retries": counted.get("judge/retries", 0.0),
        "spared": counted.get("judge/cache_hits", 0.0) + counted.get("judge/joins", 0.0),
        "latency_s": counted.get("judge/latency_s", 0.0),
        "failed": sum(count for name, count in counted.items() if name.startswith("failed/")),
        "close_wait_s": judged_s / max(trees, 1),
    }


def predicted(done: Mapping[str, RunDir], steps: int) -> dict[str, dict[str, float]]:
    """The engine's idle share on the virtual clock by case and way.

    ``done``: a run of each case, by the rule alone; the twin is calibrated on the first, of the smallest
    bound: with more trees in flight, what a tree takes says little of what its requests take.  Starts event
    loops of its own.
    """
    calibration = Calibration.from_run(next(iter(done.values()))).with_host()
    found: dict[str, dict[str, float]] = {}
    for case, one in done.items():
        found[case] = {}
        for way, judge in ((RULE, None), (SLOW, JudgeModel(*JUDGES[SLOW]))):
            twin = Twin(one.config(), calibration.models, steps, judge=judge)
            run_virtually(twin.run())
            found[case][way] = mean_over_engines(twin.result(FILL).idle)
    return found


def compared(rows: Sequence[Mapping[str, Any]], case: str, virtual: Mapping[str, float]) -> dict[str, Any]:
    """The engine's idle share in one case, mean over the runs of each way, and by how many points the judge
    raises it: by what its requests cost the processors, by its latency, and by its latency on the virtual
    clock.
    """
    runs = [row for row in rows if row["case"] == case]

    def mean(way: str, key: str) -> float:
        return statistics.fmean(row[key] for row in runs if row["way"] == way)

    idle = {way: mean(way, "engine_idle") for way in (RULE, *JUDGES)}
    return {
        "case": case,
        **idle,
        "points": 100 * (idle[SLOW] - idle[RULE]),
        "points of requests": 100 * (idle[AT_ONCE] - idle[RULE]),
        "points of latency": 100 * (idle[SLOW] - idle[AT_ONCE]),
        "virtual, rule": virtual[RULE],
        "virtual, slow judge": virtual[SLOW],
        "virtual points": 100 * (virtual[SLOW] - virtual[RULE]),
        "step's length": mean(SLOW, "step_s") / mean(RULE, "step_s"),
        "versions of latency": mean(SLOW, "close_wait_s") / mean(RULE, "step_s"),
    }


def write_report(result: dict[str, Any], out_dir: Path) -> dict[str, Any]:
    """``result``: as the benchmark returns it."""
    report = Report(
        out_dir,
        "judge",
        "A slow judge beside the rule",
        f"Whole runs of the quickstart on this machine; the slow judge answers after {result['seconds']:g} s "
        f"and fails {result['failures']:.0%} of its requests. The first {result['left_out']} steps of a run "
        "do not count.",
    )
    report.section(
        "The engine's idle share",
        "A judge that answers at once shows what its requests cost on processors that all parts share; the "
        "slow one, what its latency costs besides; the virtual clock, what that would be with processors to "
        "spare.",
    )
    report.table(
        "By the rule alone, with a judge, and the differences in points",
        list(result["compared"][0]),
        [list(row.values()) for row in result["compared"]],
        note="step's length: with the slow judge, over that without; versions of latency: training steps "
        "of a run without that pass while a tree waits for its verdicts, so much more of flow.staleness "
        "makes up for them",
    )
    report.table(
        "Runs, in the order in which they were made",
        list(result["runs"][0]),
        [list(row.values()) for row in result["runs"]],
        note="may_fly: trees that may be in flight; growing, judged (all branches ended, a score to come), "
        "queued, trained: how many of them were, on average. rows_per_decode: branches in a decode step; "
        "tokens_per_step: that the engine sampled for a training step; untrained: trees that had closed and "
        "were not trained on when the run ended. spared: leaves whose verdict was known or on its way; "
        "close_wait_s: per tree, from the end of its last branch to the last score; server_cpu_s: the "
        "processor's time in the judge's server",
    )
    report.facts({"settings": " ".join(SETTINGS), "steps": str(result["steps"])})
    return report.finish(result)
