"""``espalier bench memory``: peak bytes of a training step at large shapes, on fake tensors, part by part.

One rank of a model takes a whole step on one row: model, gradients, optimizer, forward, backward, step.  No
memory is needed, and no GPU.  Every layer adds the same, so that two and four layers say what all of them
take.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from system.bench.fake_gpu import Meter, fused
from system.bench.report import Report
from system.config import Config, ConfigError, LoraConfig
from system.learn.sizes import LOGITS
from system.models.adapter import adapter_of
from system.models.known import KNOWN
from system.models.shape import ModelShape
from system.plan.hardware import GIB, GPUS
from system.plan.memory import learner_memory

WHOLE = 1 << 62  # logits at one time: all


@dataclass(frozen=True)
class StepSettings:
    """How a step is taken."""

    name: str
    recompute: str
    whole_logits: bool = False
    offload: bool = False
    sequence_parallel: bool = True
    pp: int = 1  # pipeline stages
    stage: int = 0  # of them the one that is measured
    cp: int = 1  # ranks that share a row
    lora: int = 0  # rank of adapters on all projections; 0: none


SETTINGS = (
    StepSettings("before: logits whole", "none", whole_logits=True),
    StepSettings("logits in chunks", "none"),
    StepSettings("+ recompute=selective", "selective"),
    StepSettings("+ offload", "selective", offload=True),
    StepSettings("recompute=full", "full"),
    StepSettings("recompute=full, offload", "full", offload=True),
    StepSettings("recompute=selective, LoRA of rank 16", "selective", lora=16),
)
# The model, and the ranks that share every layer of it.
MODELS = {"7B": ("qwen2.5-7b", 4), "14B": ("qwen3-14b", 4), "32B": ("qwen3-32b", 8)}
TOKENS = (16_384, 32_768, 65_536)


@dataclass(frozen=True)
class Peak:
    """Bytes of one rank."""

    states: int  # weights, gradients and optimizer on the GPU
    host: int  # an offloaded optimizer, and what is on its way
    step: int  # what a step takes besides, at its peak
    plan: float  # what `espalier plan` says of states and step

    @property
    def device(self) -> int:
        return self.states + self.step


def run(out_dir: Path, words: list[str], quick: bool = False) -> dict[str, Any]:
    """Measure the models named in ``words`` (7B, 14B, 32B; none: all), print tables, write ``memory.json``.

    ``quick``: rows of 16,384 tokens only.  Raises ``ConfigError`` for a model that is not there.
    """
    if unknown := [word for word in words if word not in MODELS]:
        raise ConfigError(f"bench memory {unknown[0]}: there are {', '.join(MODELS)}")
    page = Report(
        out_dir,
        "memory",
        "Memory of a training step",
        "Peak GiB on one GPU of tp that share every layer, with sequence parallelism, for one row of so many "
        "tokens, all scored; in brackets what `espalier plan` says. A GPU of 80 GB has 74.5 GiB, of which "
        f"some {GPUS['h100'].reserved / GIB:.0f} go to CUDA and NCCL. Host: GiB per rank.",
    )
    found: dict[str, Any] = {}
    for size in words or MODELS:
        name, tp = MODELS[size]
        lengths = TOKENS[:1] if quick else TOKENS
        peaks = {way: [peak(KNOWN[name], tp, n, way) for n in lengths] for way in SETTINGS}
        page.table(
            f"{KNOWN[name].name}, tp = {tp}",
            ["", *(f"{n // 1024}k tokens" for n in lengths), "host"],
            [
                [
                    way.name,
                    *(f"{p.device / GIB:.1f} ({p.plan / GIB:.1f})" for p in row),
                    f"{row[0].host / GIB:.1f}",
                ]
                for way, row in peaks.items()
            ],
        )
        found[size] = {
            way.name: {n: asdict(p) for n, p in zip(lengths, row, strict=True)} for way, row in peaks.items()
        }
    return page.finish({"peaks": found})


def peak(shape: ModelShape, tp: int, tokens: int, way: StepSettings) -> Peak:
    """One step of rank 0 of ``tp`` on a row of ``tokens`` tokens, in bfloat16."""
    two, four = (measure(replace(shape, layers=layers), tp, tokens, way) for layers in (2, 4))
    return of_all_layers(two, four, shape.layers)


def of_all_layers(two: Peak, four: Peak, layers: int) -> Peak:
    """What ``layers`` of them take, by what two and four take."""
    more = (layers - 2) // 2
    pairs = zip(astuple(two), astuple(four), strict=True)
    return Peak(*(a + more * (b - a) for a, b in pairs))


def measure(shape: ModelShape, tp: int, tokens: int, way: StepSettings) -> Peak:
    """:func:`peak`, with all layers of ``shape``; a pipeline's stage holds as many rows as 1F1B lets it."""
    from system.learn import cpu

    with cpu.quick_import():
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        from system.learn import parallel
        from system.learn.context import Context
        from system.learn.model import build, transformer_config
        from system.learn.offload import HostAdam
        from system.learn.optimizer import DeviceAdam

    config = Config()
    config.learn.tp, config.learn.micro_tokens = tp, tokens
    config.learn.sequence_parallel, config.learn.pp = way.sequence_parallel, way.pp
    config.learn.recompute, config.learn.offload, config.learn.cp = way.recompute, way.offload, way.cp
    config.learn.lora = LoraConfig(rank=way.lora)
    learn, device = config.learn, torch.device("cpu")
    rank = tp * way.cp * way.stage
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=learn.ranks)
    cpu.install()
    meter = Meter()
    try:
        layout = parallel.lay_out(config, rank, device)
        logits = patch("system.learn.head.LOGITS", WHOLE if way.whole_logits else LOGITS)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        fake.cache_enabled = False  # its keys would keep storages alive
        # Parameters arrive from the other copies where they lie; fake tensors know no such collective.
        arrival = patch.object(DistributedDataParallel, "start_param_sync")
        with fake, fused(), logits, arrival, meter:
            transformer = transformer_config(shape, learn, torch.bfloat16)
            setattr(transformer, "bias_activation_fusion", True)  # noqa: B010 -- as on a GPU
            model = build(shape, transformer, "flex", adapter_of(learn.lora, shape))
            with cpu.scope():
                wrapped = DistributedDataParallel(
                    transformer,
                    DistributedDataParallelConfig(
                        grad_reduce_in_fp32=True, use_distributed_optimizer=way.offload
                    ),
                    model,
                )
            meter.restart()
            before = meter.now
            optimizer = (
                HostAdam(wrapped, layout, learn) if way.offload else DeviceAdam(wrapped, transformer, learn)
            )
            meter.restart()
            host = meter.now - before if way.offload else 0
            states = meter.now - host
            _rows(model, layout, Context.of(layout, learn), tokens)
            optimizer._apply(1e-6)  # pyright: ignore[reportPrivateUsage]: the norm is no number here
            top = meter.peak - host
            del optimizer, wrapped, model
        plan = learner_memory(shape, learn)
        return Peak(states, host, top - states, plan.total)
    finally:
        parallel.stop()


def _rows(model: Any, layout: Any, context: Any, tokens: int) -> None:
    """Forward passes of as many rows as the stage holds at once, then their backward passes; a row is one
    path, of which a context-parallel rank has its share.
    """
    from system.learn.attention import TreeMask
    from system.learn.context import RowShare
    from system.learn.head import logprob_entropy

    exit = np.full(tokens, tokens)
    share, mask = None, TreeMask(torch.from_numpy(exit))
    if context is not None:
        share = RowShare(context, exit, np.arange(tokens), layout.device)
        mask = TreeMask(torch.from_numpy(exit), torch.from_numpy(share.index), share.keys_and_values)
        tokens //= layout.cp
    token = torch.zeros(tokens, dtype=torch.int64)
    spread = layout.tp if model.config.sequence_parallel else 1
    shape = (tokens // spread, 1, model.config.hidden_size)
    held: deque[tuple[Any, Any]] = deque()
    for _ in range(layout.pp - layout.pp_rank):
        received = None
        if layout.pp_rank:
            received = torch.empty(shape, dtype=model.config.params_dtype, requires_grad=True)
        model.set_input_tensor(received)
        output = model(token, torch.arange(tokens), mask, torch.arange(tokens))
        if layout.last_stage:
            weight, vocab = model.output_weight, model.shape.vocab
            logprob, entropy = logprob_entropy(output, weight, token, vocab, layout.tp_group)
            if share is not None:
                logprob, entropy = share.of_all(torch.stack([logprob, entropy], 1)).T.contiguous()
            output = (logprob + entropy).sum()
            del logprob, entropy
        held.append((received, output))
        del received, output
    while held:
        _, output = held.popleft()
        torch.autograd.backward(output, None if layout.last_stage else torch.empty_like(output))
