"""``espalier study``: a question, answered by many small runs.

Every arm begins with the same weights and is asked the same questions; arms differ in a setting or two
(:mod:`.questions`).  What an arm learned is compared at equal tokens and at equal tool calls, seed by seed.
Runs that are there already are not made again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from system.bench.processes import run_to_end
from system.config import load, to_yaml
from system.errors import EspalierError
from system.observe import lease
from system.study.measure import Trial
from system.study.questions import QUESTIONS, Study
from system.study.report import write_report

SETTINGS = ("flow.staleness=0", "flow.window=1", "learn.tp=1", "checkpoint.every=0", "observe.trees=0")
RUN_S = 3600.0  # after which a run has failed
Key = tuple[str, str, int]  # task, arm, seed


class RunsFailed(EspalierError):
    """Runs of a study that failed; the message names the first."""


def study(
    name: str,
    out: Path,
    recipes: Sequence[Path],
    arms: Sequence[str],
    seeds: int,
    steps: int,
    every: int,
    jobs: int,
) -> dict[str, Any]:
    """Make the runs that are not there, ``jobs`` at a time, then the report; returns its figures.

    ``name`` is one of :data:`QUESTIONS`, ``arms`` are some of its own.

    Seeds come first: a study that is stopped has whole rounds of all arms.  Raises :class:`RunsFailed`
    once the others are made.
    """
    question = QUESTIONS[name]
    starts = {
        (recipe.stem, seed): _trial(question, out, recipe, "start", seed, 0, every)
        for seed in range(seeds)
        for recipe in recipes
    }
    runs = {
        (recipe.stem, arm, seed): _trial(question, out, recipe, arm, seed, steps, every)
        for seed in range(seeds)
        for recipe in recipes
        for arm in arms
    }
    out.mkdir(parents=True, exist_ok=True)
    with lease.held(out):  # another study here would make the same runs
        asyncio.run(_make({(task, "start", seed): trial for (task, seed), trial in starts.items()}, jobs))
        asyncio.run(_make(runs, jobs))
    results = {key: json.loads(Path(trial.result).read_bytes()) for key, trial in runs.items()}
    if len(codes := sorted({str(result.get("code", "an earlier one")) for result in results.values()})) > 1:
        print(
            f"WARNING: the runs in {out} were made by {len(codes)} versions of the code ({', '.join(codes)}; "
            '"code" of each file in runs/): for one version remove the others\' and start this again',
            flush=True,
        )
    return write_report(name, results, out)


def _trial(question: Study, out: Path, recipe: Path, arm: str, seed: int, steps: int, every: int) -> Trial:
    """One run; with the arm "start" the start model that all arms of a task and seed share.

    Raises ConfigError for a recipe that cannot be.
    """
    common = [*SETTINGS, f"run.seed={seed}"]
    own = [*common, f"run.steps={steps}", *question.arms.get(arm, ())]
    shared = _digest(recipe, [*common, "run.steps=0"])
    start = out / "starts" / f"{recipe.stem}-s{seed}-{shared[:8]}"
    result = out / "runs" / f"{recipe.stem}-{arm}-s{seed}.json"
    return Trial(str(recipe), own, _digest(recipe, own), steps, every, str(start), str(result))


def _digest(recipe: Path, overrides: list[str]) -> str:
    return hashlib.sha256(to_yaml(load(recipe, overrides)).encode()).hexdigest()


async def _make(wanted: dict[Key, Trial], jobs: int) -> None:
    """Those of ``wanted`` that are not there, or were made with other settings."""
    missing = {key: trial for key, trial in wanted.items() if not _made(trial)}
    room, done, began = asyncio.Semaphore(jobs), 0, time.monotonic()
    failed: list[str] = []

    async def make(key: Key, trial: Trial) -> None:
        nonlocal done
        async with room:
            name = " ".join(map(str, key))
            try:
                found = await _run(trial)
            except (RuntimeError, TimeoutError) as error:
                failed.append(f"{name}: {error}")
                print(f"{name} failed: {error}", flush=True)
                return
        done += 1
        left = (len(missing) - done - len(failed)) * (time.monotonic() - began) / done / 60
        curve = [point["accuracy"] for point in found["points"]]
        learned = f", accuracy {curve[0]:.3f} -> {curve[-1]:.3f}" if curve else ""
        print(
            f"{done}/{len(missing)}  {name}{learned}, {found['seconds']:.0f} s; {left:.0f} min to go",
            flush=True,
        )

    async with asyncio.TaskGroup() as tasks:
        for key, trial in missing.items():
            tasks.create_task(make(key, trial))
    if failed:
        raise RunsFailed(f"{len(failed)} runs failed, the first: {failed[0]}")


def _made(trial: Trial) -> bool:
    try:
        return json.loads(Path(trial.result).read_bytes())["trial"] == asdict(trial)
    except (OSError, ValueError, KeyError):
        return False


async def _run(trial: Trial) -> dict[str, Any]:
    """One run in a process of its own, on one core.  Raises RuntimeError if it fails, TimeoutError after
    ``RUN_S``.
    """
    order, log = _ordered(trial)
    await run_to_end("system.study.measure", str(order), log=log, limit_s=RUN_S, threads=1)
    return _taken(trial, order, log)


def _ordered(trial: Trial) -> tuple[Path, Path]:
    """The trial in a file, and where its process may write what it says."""
    result = Path(trial.result)
    result.parent.mkdir(parents=True, exist_ok=True)
    order = result.with_suffix(".trial")
    order.write_text(json.dumps(asdict(trial)), encoding="utf-8")
    return order, result.with_suffix(".log")


def _taken(trial: Trial, order: Path, log: Path) -> dict[str, Any]:
    """The result; what else the process left is removed."""
    order.unlink()
    log.unlink()
    return json.loads(Path(trial.result).read_bytes())
