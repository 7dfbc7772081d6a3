"""``espalier bench trl``: whole runs beside TRL's GRPOTrainer, on the same work on this machine.

TRL 1.16 runs in an environment of its own (``make bench-trl``) by our script on its public interface
(:mod:`system.bench.trl_train`): the same weights, prompts (token by token), reward and tools, the same number
of completions and of tokens at most, sampled at temperature 1, with the quickstart's algorithm on linear
rollouts.  Espalier's ways are recipes of ``configs/baselines``.

Every way runs once per round and tool latency, in an order that shifts by one each round; what is compared
are ratios within a round.  A run during which others used the machine is repeated, and marked where that does
not help.  What is left after an interruption is a report on the runs until then.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from system.bench.baselines import BASELINES, Way
from system.bench.processes import run_to_end, server
from system.bench.trl_plan import CONTESTANTS, Contestant, Plan
from system.bench.trl_report import write_report
from system.bench.trl_work import BenchQuestion, WorkDone, of_espalier, of_trl, steady
from system.bench.usage import Usage, Watch
from system.config import Config
from system.errors import ConfigError
from system.observe.jsonl import JsonlWriter, read_jsonl
from system.observe.rundir import RunDir
from system.rollout.chat import Chat
from system.rollout.encode import local_tokenizer
from system.tasks.base import HasCorpus, make_task
from system.tree.store import read_trees
from system.twin.records import steps_of

CHECKOUT = Path(__file__).resolve().parents[2]
PYTHON = CHECKOUT / ".venv-trl" / "bin" / "python"
RUN_S = 1800.0  # at most, of one run
REPEATS = 2  # of a run during which the machine was not quiet
REMEDY = "make bench-trl"
# Of Espalier's runs.  The answers of pure tools are not kept: TRL asks for each anew.
SETTINGS = (
    "warmstart.steps=0",
    "eval.questions=0",
    "checkpoint.every=0",
    "tools.cache_size=0",
    "observe.wandb=disabled",
)
TEACH = ("run.steps=1", "learn.tp=1", "learn.lr=1e-12", "learn.weight_decay=0", "observe.wandb=disabled",
         "eval.questions=0", "checkpoint.every=0")  # fmt: skip


def run(
    out_dir: Path,
    quick: bool = False,
    words: Sequence[str] = (),
    rounds: int | None = None,
    latency: str = "",
    steps: int | None = None,
) -> dict[str, Any]:
    """Measure, write ``trl.json``, ``trl.md``, ``trl.png`` and ``trl.html``; returns what the JSON holds.

    ``words``: the ways, by default all; ``latency``: seconds that a search takes longer, with commas.
    Raises ConfigError for what cannot be run, RuntimeError for a run that fails or does other work.
    """
    plan = Plan.of(quick, words, rounds, latency, steps)
    if any(CONTESTANTS[way].way is None for way in plan.ways) and not os.access(PYTHON, os.X_OK):
        raise ConfigError(f"bench trl: there is no interpreter {PYTHON}: {REMEDY}")
    bench = Bench(out_dir, plan)
    try:
        asyncio.run(bench.measure())
    finally:
        result = write_report(bench.result(), out_dir) if bench.rows else bench.result()
    return result


class Bench:
    """One measurement, run by run."""

    def __init__(self, out_dir: Path, plan: Plan) -> None:
        self._plan, self._out = plan, out_dir.resolve()
        self._runs = self._out / time.strftime("runs-%Y%m%d-%H%M%S")
        self._runs.mkdir(parents=True)
        self._base = Way("espalier").config()
        self._asked: list[BenchQuestion] = []
        self._corpus = self._runs / "corpus.jsonl"
        self.rows: list[dict[str, Any]] = []
        self._accuracy_before: float | None = None

    def result(self) -> dict[str, Any]:
        plan, ways = self._plan, {way: CONTESTANTS[way] for way in self._plan.ways}
        return {
            "runs": self.rows,
            "complete": sum(not row["repeated"] for row in self.rows) == len(plan.turns()),
            "plan": asdict(plan),
            "ways": {
                name: one.says
                + "".join(f" ({one.way.path.name} {' '.join(one.way.overrides)})" if one.way else "")
                for name, one in ways.items()
            },
            "settings": list(SETTINGS),
            "accuracy_before": self._accuracy_before,
        }

    async def measure(self) -> None:
        """All runs; their rows are kept as they come."""
        model = await self._model()
        self._prepare(model)
        turns = self._plan.turns()
        if self._plan.accuracy:
            self._accuracy_before = await self._accuracy(model, model, "before")
        kept = JsonlWriter(self._runs / "rows.jsonl")
        try:
            for number, turn in enumerate(turns, 1):
                for attempt in range(REPEATS + 1):
                    print(
                        "run {} of {}: round {}, {:g} s, {} …".format(number, len(turns), *turn), flush=True
                    )
                    row = await self._row(model, *turn, attempt)
                    self.rows.append(row)
                    kept.write(row)
                    print(f"  {told(row)}", flush=True)
                    if not row["repeated"]:
                        break
        finally:
            kept.close()

    async def _row(self, model: Path, number: int, latency: float, name: str, attempt: int) -> dict[str, Any]:
        """A run, and, unless it will be repeated, the accuracy of what it trained."""
        label = f"{number}-{latency:g}s-{name}-{attempt}"
        row, trained = await self._one(model, name, latency, label)
        repeated = bool(row["noise"]) and attempt < REPEATS
        row |= {"round": number, "latency": latency, "way": name, "repeated": repeated, "accuracy": None}
        if (
            self._plan.accuracy
            and CONTESTANTS[name].judged
            and latency == self._plan.latencies[0]
            and not repeated
        ):
            row["accuracy"] = await self._accuracy(trained, model, label)
        return row

    async def _model(self) -> Path:
        """The warm-started model that all begin with: made once, and kept for the next measurement."""
        words = [*TEACH, f"warmstart.steps={self._plan.warm_steps}"]
        made = self._out / f"model-{self._plan.warm_steps}"
        if not (made / "config.json").is_file():
            print(f"warm start of the model, {self._plan.warm_steps} steps …", flush=True)
            taught = await self._espalier("warm-start", Way("espalier"), words, None)
            shutil.copytree(taught.model, made.with_suffix(".new"), dirs_exist_ok=True)
            made.with_suffix(".new").rename(made)
        return made

    def _prepare(self, model: Path) -> None:
        """The questions in the order in which a run of seed 0 issues them, and the corpus."""
        config = self._base
        task = make_task(config)
        assert isinstance(task, HasCorpus)
        self._corpus.write_text("".join(json.dumps(row) + "\n" for row in task.corpus()), encoding="utf-8")
        prompts = task.train()
        chat = Chat(local_tokenizer(str(model)))
        order = np.random.default_rng([config.run.seed, 0]).permutation(len(prompts))
        most = (max(self._plan.steps, self._plan.slow_steps) + 1) * config.flow.batch_leaves
        for prompt in (prompts[i] for i in order[: most // config.rollout.leaves]):
            messages = [dict(message) for message in prompt.messages]
            ids = chat.encode(messages).tolist()
            self._asked.append(BenchQuestion(prompt.id, messages, list(prompt.answers), ids))

    async def _one(self, model: Path, name: str, latency: float, label: str) -> tuple[dict[str, Any], Path]:
        """One run: its figures, and the directory of the model that it left.

        Raises RuntimeError if it fails or does other work than was asked for.
        """
        contestant, steps = CONTESTANTS[name], self._plan.steps_at(latency)
        async with self._servers(contestant, latency) as (urls, pids):
            watch, began = Watch(pids), time.time()
            if contestant.way is None:
                work = await self._trl(label, contestant, model, latency, urls, watch)
                trained = self._runs / label / "model"
            else:
                words = [*SETTINGS, f"run.steps={steps}", f"model.path={model}"]
                words += [f"tools.search_url={urls['search']}"] if urls else []
                done = await self._espalier(label, contestant.way, words, watch)
                trained = done.model
                work = of_espalier(
                    steps_of(done, 0),
                    list(read_jsonl(done.ledger_path)),
                    read_trees(done.trees),
                    self._asked,
                    self._base.flow.batch_leaves,
                    in_order=contestant.way.config().flow.staleness == 0,
                )
            usage = watch.usage()
        if work.problems:
            raise RuntimeError(f"{name} did other work than was asked for: {'; '.join(work.problems[:3])}")
        return figures(work, usage, began), trained

    @asynccontextmanager
    async def _servers(
        self, contestant: Contestant, latency: float
    ) -> AsyncGenerator[tuple[dict[str, str], list[int]]]:
        """Tool servers beside a run: for TRL both, for Espalier, which has its own, a slow search."""
        trl = contestant.way is None
        if contestant.in_process or not (trl or latency):
            yield {}, []
            return
        slow = ("system.bench.slow_search", "--mean-s", str(latency))
        search = (*(slow if latency else ("system.tools.search_server",)), "--corpus", str(self._corpus))
        commands = {"search": search} | ({"python": ("system.tools.python_server",)} if trl else {})
        async with AsyncExitStack() as stack:
            urls: dict[str, str] = {}
            pids: list[int] = []
            for name, command in commands.items():
                urls[name], process = await stack.enter_async_context(server(*command, "--port", "0"))
                pids.append(process.pid)
            yield urls, pids

    async def _espalier(self, label: str, way: Way, words: Sequence[str], watch: Watch | None) -> RunDir:
        command = ["actors.cli.main", "train", str(way.path), *words, *way.overrides]
        await self._run(
            *command, f"run.dir={self._runs}", f"run.name={label}", label=label, threads=None, watch=watch
        )
        return RunDir.open(self._runs / label)

    async def _trl(
        self,
        label: str,
        contestant: Contestant,
        model: Path,
        latency: float,
        urls: dict[str, str],
        watch: Watch,
    ) -> WorkDone:
        out, config, steps = self._runs / label, self._base, self._plan.steps_at(latency)
        out.mkdir()
        job = {
            **trl_settings(config),
            "model": str(model),
            "questions": [asdict(one) for one in self._asked],
            "steps": steps,
            "continuous": contestant.continuous,
            "search_url": urls.get("search", ""),
            "python_url": urls.get("python", ""),
            "corpus": str(self._corpus),
            "delay_s": latency,
            "out": str(out),
        }
        (out / "job.json").write_text(json.dumps(job), encoding="utf-8")
        await self._run(
            "system.bench.trl_train",
            str(out / "job.json"),
            label=label,
            threads=contestant.threads,
            watch=watch,
            python=str(PYTHON),
            variables={"PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1"},
        )
        lines = list(read_jsonl(out / "steps.jsonl"))
        return of_trl(
            lines, json.loads((out / "result.json").read_bytes()), self._asked, config.rollout.leaves
        )

    async def _run(
        self,
        *command: str,
        label: str,
        threads: int | None,
        watch: Watch | None,
        python: str = sys.executable,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """``command`` to its end, and that of all that it started, also where this is interrupted."""
        try:
            await run_to_end(
                *command,
                log=self._runs / f"{label}.log",
                limit_s=RUN_S,
                python=python,
                variables={**(variables or {}), "OMP_NUM_THREADS": str(threads) if threads else None},
                started=watch.during if watch else None,
            )
        finally:
            if watch and (left := await watch.end()):
                print(f"  {label} left {left} processes behind: ended", file=sys.stderr, flush=True)

    async def _accuracy(self, trained: Path, model: Path, label: str) -> float:
        """On the quickstart's held-out questions, greedily, by ``espalier eval``."""
        judged, answer = self._runs / f"{label}-judged", self._runs / f"{label}-eval.json"
        # TRL's template and end tokens are no part of what it has learned.
        shutil.copytree(model, judged)
        shutil.copy(trained / "model.safetensors", judged)
        recipe = str(BASELINES / "synchronous.yaml")
        words = ("actors.cli.main", "eval", str(judged), "--config", recipe, "--out", str(answer))
        await run_to_end(*words, log=self._runs / f"{label}-eval.log", limit_s=RUN_S)
        return float(json.loads(answer.read_bytes())["accuracy"])


def trl_settings(config: Config) -> dict[str, Any]:
    """What Espalier's configuration says, for :class:`system.bench.trl_train.TrlJob`."""
    learn = config.learn
    names = ("lr", "weight_decay", "beta1", "beta2", "eps", "grad_clip", "clip_low", "clip_high")
    return {
        "leaves": config.rollout.leaves,
        "batch_leaves": config.flow.batch_leaves,
        "tokens": config.rollout.max_response_tokens,
        "result_tokens": config.rollout.max_tool_result_tokens,
        "calls": config.rollout.call_limit,
        "top_k": config.tools.search_top_k,
        "learn": {name: getattr(learn, name) for name in names},
    }


def figures(work: WorkDone, usage: Usage, began: float) -> dict[str, Any]:
    """A run's row.  ``began``: unix time at which it was started."""
    seconds = steady(work.ends)
    return {
        "step_s": statistics.median(seconds),
        "steps_s": seconds,
        "launch_s": work.ends[0] - began,
        "completions": work.completions,
        "calls": work.calls,
        "noise": usage.noise,
        **asdict(usage),
    }


def told(row: dict[str, Any]) -> str:
    """A run in a line."""
    after = f" — {row['noise']}{': again' if row['repeated'] else ''}" if row["noise"] else ""
    right = "" if row["accuracy"] is None else f", accuracy {row['accuracy']:.3f}"
    return (
        f"{row['step_s']:.3f} s per step, first step after {row['launch_s']:.1f} s, {row['peak_mb']:,.0f} MB"
        f"{right}; load {row['load']:.1f} before{after}"
    )
