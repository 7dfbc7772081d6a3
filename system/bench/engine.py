"""``espalier bench engine``: tokens per second of the embedded engine beside transformers' own generation.

Everything runs in turn on the same model, random weights of the quickstart's size, with the same number of
torch threads, several rounds over; what is compared is the median over rounds of the ratio within a round, so
that a busy machine slows both sides of each ratio.  Beside it stands the ratio of the sides' best rounds;
where the two differ, something else was using the machine.

* ``mixed``: 64 concurrent requests with prompts of 16 to 128 tokens and outputs of a quarter to the whole of
  ``new_tokens``, against transformers' continuous batching (paged attention): the manager that its
  ``generate_batch`` wraps, because that function takes one output length for all.  It runs with the best
  settings we found for it: those it ships with give its cache most of the free memory, which on a CPU makes
  it many times slower.
* ``equal``: 64 concurrent requests of one length, against static ``model.generate``, which needs them equal.

CPU seconds are reported beside wall time (ours: server and client together), for they tell a busy machine
from a slow engine.  Ours goes the whole way: a server process, its channel, and the client that rollouts use,
with log-probabilities and entropies of every token, which the other two do not compute.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen3ForCausalLM

from system.bench.processes import cpu_s, server
from system.bench.random_model import random_model
from system.bench.report import Report
from system.config import ModelConfig
from system.engine.control import EngineControl, Http
from system.engine.pool import EnginePool
from system.engine.protocol import SPEED_COUNTERS, GenerateRequest, Sampling
from system.tasks.tiny_model import tiny_config

VOCAB = 512
REQUESTS = 64
THREADS = 1  # torch threads of every contestant
RIVALS = {"generate_batch": "ours_mixed", "static": "ours_equal"}  # and our run on the same work
REQUIRED = {"generate_batch": 5.0, "static": 1.0}
# The best settings we found for transformers' batching here: small pages, and a cache of the size needed.
TUNED = ContinuousBatchingConfig(
    page_size=32, num_blocks=1024, max_batch_tokens=1024, use_async_batching=False
)
_RESULT_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Requests:
    """Prompts, and how many tokens to generate for each."""

    name: str
    prompts: tuple[NDArray[np.int32], ...]
    new_tokens: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.new_tokens)


@dataclass(frozen=True, slots=True)
class Speed:
    """Generated tokens per second of wall time and of CPU time (all processes together)."""

    per_s: float
    per_cpu_s: float


def workloads(seed: int, new_tokens: int) -> tuple[Requests, Requests]:
    """The mixed and the equal batch."""
    rng = np.random.default_rng(seed)

    def prompt(length: int) -> NDArray[np.int32]:
        return rng.integers(1, VOCAB, length).astype(np.int32)

    prompts = tuple(prompt(int(rng.integers(16, 129))) for _ in range(REQUESTS))
    outputs = tuple(int(rng.integers(max(new_tokens // 4, 1), new_tokens + 1)) for _ in range(REQUESTS))
    equal = tuple(prompt(64) for _ in range(REQUESTS))
    return Requests("mixed", prompts, outputs), Requests("equal", equal, (new_tokens,) * REQUESTS)


def run(out_dir: Path, quick: bool = False) -> dict[str, Any]:
    """Measure, print a table, write ``engine.json``, ``.png`` and ``.html``; returns what the JSON holds.

    ``quick`` makes two short rounds, enough to see that it works and not to quote.
    """
    rounds, new_tokens = (2, 32) if quick else (5, 128)
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            model = random_model(Path(scratch), tiny_config(ModelConfig(), VOCAB, eos_token_id=0), seed=0)
            samples, sums = asyncio.run(_measure(model, scratch, rounds, new_tokens))
    finally:
        torch.set_num_threads(before)
    result = {
        **summary(samples),
        "rounds": [{name: asdict(speed) for name, speed in sample.items()} for sample in samples],
        "engine_sums": sums,  # over its steps: what the digital twin's engine can be fitted to
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "requests": REQUESTS,
        "new_tokens": new_tokens,
        "threads": THREADS,
        "cores": os.cpu_count(),
        "model": asdict(ModelConfig()),
    }
    return _write(out_dir, result)


def summary(samples: list[dict[str, Speed]]) -> dict[str, Any]:
    """Medians over the rounds of each contestant's speed and of the ratios, and whether the requirements
    hold.
    """
    ratios = {
        rival: statistics.median(s[ours].per_s / s[rival].per_s for s in samples)
        for rival, ours in RIVALS.items()
    }
    best = {name: max(s[name].per_s for s in samples) for name in samples[0]}
    return {
        "tokens_per_s": {n: statistics.median(s[n].per_s for s in samples) for n in samples[0]},
        "tokens_per_cpu_s": {n: statistics.median(s[n].per_cpu_s for s in samples) for n in samples[0]},
        "ratio": ratios,
        "ratio_of_best": {rival: best[ours] / best[rival] for rival, ours in RIVALS.items()},
        "required": REQUIRED,
        "passed": all(ratios[rival] >= least for rival, least in REQUIRED.items()),
    }


async def _measure(
    model: Qwen3ForCausalLM, path: str, rounds: int, new_tokens: int
) -> tuple[list[dict[str, Speed]], dict[str, float]]:
    """The rounds, and the sums that our engine's server counted meanwhile."""
    command = ("system.engine.embedded", "--model", path, "--port", "0")
    command += ("--device", "cpu", "--threads", str(THREADS))
    async with server(*command, threads=THREADS) as (url, process), Http() as http:
        client, control = EnginePool([url], channel=True), EngineControl(url, http)

        async def one_round(mixed: Requests, equal: Requests, tag: str) -> dict[str, Speed]:
            return {
                "ours_mixed": await _timed(_ours(client, control, mixed, tag + "m"), mixed, process),
                "generate_batch": await _timed(
                    asyncio.to_thread(_generate_batch, model, mixed), mixed, process
                ),
                "ours_equal": await _timed(_ours(client, control, equal, tag + "e"), equal, process),
                "static": await _timed(asyncio.to_thread(_static, model, equal), equal, process),
            }

        try:
            await one_round(*workloads(1, 8), tag="warm")
            mixed, equal = workloads(0, new_tokens)
            before = (await control.info()).counters
            samples = [await one_round(mixed, equal, tag=str(number)) for number in range(rounds)]
            after = (await control.info()).counters
        finally:
            await client.close()
    return samples, {name: after[name] - before[name] for name in SPEED_COUNTERS}


async def _timed(contest: Awaitable[int], work: Requests, engine: psutil.Process) -> Speed:
    """Speed of something that generates all of ``work`` and returns how many tokens that were."""
    cpu, began = time.process_time() + cpu_s(engine), time.perf_counter()
    count = await contest
    elapsed, used = time.perf_counter() - began, time.process_time() + cpu_s(engine) - cpu
    if count != work.tokens:
        raise RuntimeError(f"{work.name}: {count} tokens generated, {work.tokens} expected")
    return Speed(count / elapsed, count / used)


async def _ours(client: EnginePool, control: EngineControl, work: Requests, tag: str) -> int:
    """All requests at once; the prefix cache starts empty."""
    await control.post("/flush_cache")

    async def one(number: int) -> int:
        sampling = Sampling(work.new_tokens[number], ignore_eos=True)
        request = GenerateRequest(f"{tag}-{number}", work.prompts[number], sampling)
        return sum([len(chunk.tokens) async for chunk in client.generate(request)])

    return sum(await asyncio.gather(*(one(number) for number in range(REQUESTS))))


def _generate_batch(model: Qwen3ForCausalLM, work: Requests) -> int:
    torch.set_num_threads(THREADS)
    count = 0
    with model.continuous_batching_context_manager(
        generation_config=_sampling(max(work.new_tokens), eos=-1),  # -1: no token ends a sequence
        continuous_batching_config=TUNED,
        warmup=False,
    ) as manager:
        for prompt, new_tokens in zip(work.prompts, work.new_tokens, strict=True):
            manager.add_request(prompt.tolist(), max_new_tokens=new_tokens)
        for _ in work.prompts:
            result = manager.get_result(timeout=_RESULT_DEADLINE_S)
            if result is None:
                raise RuntimeError(f"transformers: no result within {_RESULT_DEADLINE_S} s")
            count += len(result.generated_tokens)
    return count


def _static(model: Qwen3ForCausalLM, work: Requests) -> int:
    torch.set_num_threads(THREADS)
    prompts = torch.from_numpy(np.stack(work.prompts).astype(np.int64))
    output = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        prompts, _sampling(work.new_tokens[0], eos=None), attention_mask=torch.ones_like(prompts)
    )
    return int(output.shape[0] * (output.shape[1] - prompts.shape[1]))


def _sampling(new_tokens: int, eos: int | None) -> GenerationConfig:
    """Plain sampling at temperature 1, as ours; ``top_k`` 0 switches transformers' default of 50 off."""
    return GenerationConfig(
        max_new_tokens=new_tokens, do_sample=True, top_k=0, top_p=1.0, eos_token_id=eos, pad_token_id=0
    )


_LABELS = {
    "ours_mixed": "espalier, mixed lengths",
    "generate_batch": "transformers continuous batching, mixed lengths",
    "ours_equal": "espalier, equal lengths",
    "static": "transformers generate (static), equal lengths",
}


def _write(out_dir: Path, result: dict[str, Any]) -> dict[str, Any]:
    page = Report(
        out_dir,
        "engine",
        "The embedded engine beside transformers' generation",
        f"{REQUESTS} requests, up to {result['new_tokens']} new tokens, {result['threads']} thread(s). "
        "Medians over rounds; ours goes through HTTP, with log-probabilities and entropies of every token.",
    )
    page.table(
        "Generated tokens",
        ["engine", "per second", "per CPU second"],
        [[label, result["tokens_per_s"][n], result["tokens_per_cpu_s"][n]] for n, label in _LABELS.items()],
    )
    page.table(
        "Ratios",
        ["against", "within a round (median)", "of the best rounds", "required", "verdict (median)"],
        [
            [name, ratio, result["ratio_of_best"][name], least, "holds" if ratio >= least else "MISSED"]
            for (name, least), ratio in zip(REQUIRED.items(), result["ratio"].values(), strict=True)
        ],
    )
    page.figure("engine", _plot(result))
    return page.finish(result)


def _plot(result: dict[str, Any]) -> Figure:
    names = list(_LABELS)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    colours = ["tab:green" if name.startswith("ours") else "tab:gray" for name in names]
    axes.barh(
        [_LABELS[name] for name in names], [result["tokens_per_s"][name] for name in names], color=colours
    )
    for row, name in enumerate(names):
        axes.plot([sample[name]["per_s"] for sample in result["rounds"]], [row] * len(result["rounds"]), "k|")
    axes.invert_yaxis()
    axes.set_xlabel("generated tokens per second (bar: median, marks: rounds)")
    return figure
