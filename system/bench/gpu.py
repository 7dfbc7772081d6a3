"""``espalier bench gpu``: what the GPU at hand does with our kernels and our learner, at large shapes.

The shapes are those of one rank of Qwen3-14B under tensor parallelism 4, with 20 of its 40 layers, which
fit one GPU of 80 GB with their optimizer state.  Each probe runs in a process of its own: one that runs out
of memory or time, or breaks the device, is reported by name and costs the others nothing.  Without a GPU the
same probes run on the CPU at toy size, so that the command cannot rot.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import Qwen3ForCausalLM

from system.bench.random_model import forked_tree, random_model
from system.bench.report import Report
from system.bench.shard import (
    LARGE,
    TOY,
    Scale,
    attended_pairs,
    even_mask,
    qwen3,
    random_heads,
)
from system.config import Config, ConfigError
from system.doctor.facts import version_of
from system.learn.attention import TreeMask, attend, choose_kernels
from system.learn.head import logprob_entropy
from system.models.shape import ModelShape
from system.plan.hardware import GIB
from system.plan.memory import learner_memory
from system.tree.pack import pack_share
from system.tree.stats import TreeStats

PROBE_DEADLINE_S = 240.0


def run(out_dir: Path, words: list[str], quick: bool = False) -> dict[str, Any]:
    """Run the probes named in ``words`` (none: all), print tables, write ``gpu.json`` and ``gpu.html``.

    ``quick``: toy size, also on a GPU.  Raises ``ConfigError`` for a probe that does not exist.
    """
    if unknown := [word for word in words if word not in PROBES]:
        raise ConfigError(f"bench gpu {unknown[0]}: no such probe; there are {', '.join(PROBES)}")
    scale = TOY if quick or not torch.cuda.is_available() else LARGE
    results: dict[str, Any] = {}
    for name in words or PROBES:
        print(f"bench gpu: {name} ...", flush=True)
        results[name] = _in_own_process(name, scale)
    return _write(out_dir, scale, results)


def _in_own_process(name: str, scale: Scale) -> dict[str, Any]:
    code = f"from system.bench import gpu; gpu.measure({name!r}, gpu.Scale(**{asdict(scale)!r}))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=PROBE_DEADLINE_S
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {PROBE_DEADLINE_S:.0f} s"}
    if done.returncode:
        return {"error": f"ended with code {done.returncode}; see what it wrote above"}
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, scale: Scale) -> None:
    """Run one probe in this process and print its figures as the last line, in JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    try:
        figures = PROBES[name](scale, device)
    except torch.OutOfMemoryError as error:
        figures = {"error": f"out of memory: {error}"}
    print(json.dumps(figures | {"probe_s": time.perf_counter() - started}))


# ---------------------------------------------------------------------- probes


def limits(scale: Scale, device: torch.device) -> dict[str, Any]:
    """The ceilings that the other figures are read against: products in TFLOP/s, copies in GB/s."""
    n, size = scale.matmul, scale.copy_mb << 20
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    here, there = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    host = torch.empty(size, dtype=torch.uint8)
    pinned = host.pin_memory() if device.type == "cuda" else host
    copies = {
        "on the device (bytes read + written)": lambda: here.copy_(there),
        "device to host, pinned": lambda: pinned.copy_(here),
        "device to host, pageable": lambda: host.copy_(here),
        "host to device, pinned": lambda: here.copy_(pinned),
    }
    return {
        "matmul_tflops": 2 * n**3 / _seconds(lambda: a @ b, device, scale.repeats) / 1e12,
        "copy_gb_per_s": {
            where: size * (2 if "read" in where else 1) / _seconds(copy, device, 5) / 1e9
            for where, copy in copies.items()
        },
    }


def attention(scale: Scale, device: torch.device) -> dict[str, Any]:
    """One layer's tree attention, forward and backward, over masks of one row's length; flash attention of
    PyTorch on the causal path beside it.

    TFLOP/s count the pairs that may attend: 4 operations per pair, head and dimension forward, 10 backward.
    """
    n = scale.tokens
    few = even_mask(n, 1, scale.leaves)
    masks = {"path": torch.full((n,), n), "one tree": few, "many trees": even_mask(n, 16, 4)}
    scaling = scale.head_dim**-0.5
    rows = {}
    for name, exit in masks.items():
        q, k, v = random_heads(scale, device)
        mask = TreeMask(exit.to(device))
        for kernels in _kernels_here(scale):
            work = partial(attend, q, k, v, mask, scaling, kernels)
            rows[f"{name}, {kernels}"] = _attention_figures(work, (q, k, v), exit, scale, device)
    q, k, v = random_heads(scale, device)
    flash = torch.nn.functional.scaled_dot_product_attention
    work = partial(flash, q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    rows["path, PyTorch's flash"] = _attention_figures(work, (q, k, v), masks["path"], scale, device)
    return {"masks": rows}


def _kernels_here(scale: Scale) -> list[str]:
    """The values of ``learn.attention`` that differ here."""
    return sorted({"flex", choose_kernels("auto", torch.bfloat16, scale.head_dim)})


def _attention_figures(
    attend_all: Callable[[], torch.Tensor],
    inputs: tuple[torch.Tensor, ...],
    exit: torch.Tensor,
    scale: Scale,
    device: torch.device,
) -> dict[str, float]:
    pairs = float((exit - torch.arange(len(exit))).sum()) * scale.heads * scale.head_dim
    gradient = torch.randn_like(inputs[0])

    def both() -> None:
        torch.autograd.grad(attend_all(), inputs, gradient)

    started = time.perf_counter()
    both()  # compiles
    _wait(device)
    first = time.perf_counter() - started
    forward = _seconds(attend_all, device, scale.repeats)
    whole = _seconds(both, device, scale.repeats)
    return {
        "first_s": first,
        "forward_ms": forward * 1e3,
        "backward_ms": (whole - forward) * 1e3,
        "forward_tflops": 4 * pairs / forward / 1e12,
        "backward_tflops": 10 * pairs / (whole - forward) / 1e12,
    }


def loss(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Output projection, log-probability and entropy of every token of a row over one rank's share of the
    vocabulary.
    """
    with tempfile.TemporaryDirectory() as meeting:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{meeting}/point", rank=0, world_size=1)
        group = dist.group.WORLD
        assert group is not None
        hidden, weight = (
            torch.randn(n, scale.hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
            for n in (scale.tokens, scale.vocab)
        )
        main_grad = torch.zeros(weight.shape, device=device)
        setattr(weight, "main_grad", main_grad)  # noqa: B010
        target = torch.randint(0, scale.vocab, (scale.tokens,), device=device)

        def both() -> None:
            logprob, entropy = logprob_entropy(hidden, weight, target, scale.vocab, group)
            hidden.grad = None
            (logprob.sum() + entropy.sum()).backward()

        _reset_peak(device)
        held = _allocated(device)
        seconds = _seconds(both, device, scale.repeats)
        extra = _peak(device) - held
        dist.destroy_process_group()
    return {"loss_ms": seconds * 1e3, "peak_bytes_per_logit": extra / (scale.tokens * scale.vocab)}


def learner(
    scale: Scale,
    device: torch.device,
    recompute: str = "full",
    kernels: str = "auto",
    offload: bool = False,
) -> dict[str, Any]:
    """Training steps on two full rows of trees: seconds per row, memory beside the plan's, and where the
    device's time goes.
    """
    with tempfile.TemporaryDirectory() as directory:
        random_model(Path(directory), qwen3(scale), 0, device.type)
        config = _config(scale, recompute)
        config.learn.attention, config.learn.offload = kernels, offload
        plan = learner_memory(ModelShape.from_directory(directory), config.learn, "bfloat16")
        shared, rng = scale.tokens // 2, np.random.default_rng(0)
        own = (scale.tokens - shared) // scale.leaves
        trees = [forked_tree(shared, own, scale.leaves, scale.vocab, rng) for _ in range(2)]
        stats = [TreeStats.of(tree) for tree in trees]
        trainer = _trainer(config, directory)
        packed = trainer.planner.plan(stats)
        share = pack_share(packed, 0, dict(enumerate(trees)))

        def step() -> dict[str, float]:
            return trainer.train(packed, share, version=0)

        started = time.perf_counter()
        step()
        _wait(device)
        first = time.perf_counter() - started
        _reset_peak(device)
        steps = [step() for _ in range(3)]
        seconds = statistics.median(one["time_compute_s"] for one in steps)
        shape, tokens = trainer.model.shape, sum(tree.n_tokens for tree in trees)
        pairs = sum(attended_pairs(tree) for tree in stats) * shape.heads * shape.head_dim * shape.layers
        figures = {
            "first_step_s": first,
            "row_s": seconds / sum(len(update) for update in share),
            "optimizer_s": statistics.median(one["time_optimizer_s"] for one in steps),
            "tokens_per_s": tokens / seconds,
            # Forward and backward as the model defines them; what is computed twice counts once.
            "model_tflops": (6 * shape.active * tokens + 14 * pairs) / seconds / 1e12,
            "peak_gib": _peak(device) / GIB,
            "plan_gib": plan.total / GIB,
            "kernels_ms": _kernels(step, device),
        }
        trainer.close()
        return figures


def baseline(scale: Scale, device: torch.device) -> dict[str, Any]:
    """The same number of tokens, as one path, through transformers' model with gradient checkpointing."""
    model: Any = Qwen3ForCausalLM(qwen3(scale))
    model.to(device, torch.bfloat16)
    model.gradient_checkpointing_enable()
    model.train()
    tokens = torch.randint(0, scale.vocab, (1, scale.tokens), device=device)

    def step() -> None:
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)[0, :-1]
        torch.nn.functional.cross_entropy(logits.float(), tokens[0, 1:]).backward()

    step()
    _reset_peak(device)
    seconds = _seconds(step, device, 3)
    return {
        "row_s": seconds,
        "tokens_per_s": scale.tokens / seconds,
        "peak_gib": _peak(device) / GIB,
        "kernels_ms": _kernels(step, device),
    }


def weights(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Four layers: the export that engines are fed from, and a checkpoint, in GB/s."""
    few = replace(scale, layers=min(4, scale.layers))
    with tempfile.TemporaryDirectory() as directory:
        random_model(Path(directory), qwen3(few), 0, device.type)
        trainer = _trainer(_config(few, "full"), directory)
        figures: dict[str, Any] = {}
        for turn in ("first", "second"):
            started = time.perf_counter()
            moved = sum(t.nbytes for bucket in trainer.export() for t in bucket.values())
            figures[f"export_gb_per_s_{turn}"] = moved / (time.perf_counter() - started) / 1e9
        saved = Path(directory) / "checkpoint"
        started = time.perf_counter()
        trainer.save(saved, {})
        held_up = time.perf_counter() - started
        trainer.saved()
        seconds = time.perf_counter() - started
        size = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
        trainer.close()
        return figures | {
            "export_gb": moved / 1e9,
            "checkpoint_gb": size / 1e9,
            "checkpoint_gb_per_s": size / seconds / 1e9,
            "checkpoint_holds_up_s": held_up,
        }


PROBES: dict[str, Callable[[Scale, torch.device], dict[str, Any]]] = {
    "limits": limits,
    "attention": attention,
    "loss": loss,
    **{f"learner-{how}": partial(learner, recompute=how) for how in ("full", "selective", "none")},
    "learner-none-flex": partial(learner, recompute="none", kernels="flex"),
    "learner-selective-offload": partial(learner, recompute="selective", offload=True),
    "transformers": baseline,
    "weights": weights,
}


# ---------------------------------------------------------------------- the learner


def _config(scale: Scale, recompute: str) -> Config:
    config = Config()
    config.model.dtype = "bfloat16"
    config.learn.tp = 1
    config.learn.micro_tokens = scale.tokens
    config.learn.recompute = recompute
    config.learn.lr = 0.0  # every step sees the same weights
    config.learn.weight_decay = 0.0
    return config


def _trainer(config: Config, directory: str) -> Any:
    from system.learn.trainer import Trainer

    meeting = tempfile.mkdtemp(dir=directory)
    return Trainer(config, directory, rank=0, world=1, init_method=f"file://{meeting}/point")


# ---------------------------------------------------------------------- clocks and memory


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of ``work``, after one run that warms up."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _kernels(step: Callable[[], object], device: torch.device) -> list[tuple[str, float]]:
    """The 15 kernels of one step that take most of the device's time, in milliseconds."""
    if device.type != "cuda":
        return []
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        _wait(device)
    spent = [(e.key, e.self_device_time_total / 1e3) for e in profile.key_averages()]
    return sorted(
        ((name[:90], ms) for name, ms in spent if ms > 0 and not name.startswith("aten::")),
        key=lambda x: -x[1],
    )[:15]


# ---------------------------------------------------------------------- the report


def _write(out_dir: Path, scale: Scale, results: dict[str, Any]) -> dict[str, Any]:
    page = Report(out_dir, "gpu", "Kernels and learner on the GPU at hand")
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: toy size on the CPU"
    versions = {name: version_of(name) for name in ("torch", "triton", "megatron-core", "transformers")}
    page.facts({"card": card, **versions, **asdict(scale)})
    for name, figures in results.items():
        page.table(name, ["figure", "value"], [[key, value] for key, value in _flat(figures)])
    return page.finish({"card": card, "versions": versions, "scale": asdict(scale), "probes": results})


def _flat(figures: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in figures.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}: ")
        elif isinstance(value, list):
            rows += [(f"{prefix}{name}", ms) for name, ms in value]
        else:
            rows.append((prefix + key, value))
    return rows
