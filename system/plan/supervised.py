"""A supervised run before it is started: the learner by itself, on all of its GPUs."""

from __future__ import annotations

from dataclasses import replace

from system.config import Config, ConfigError
from system.models.known import shape_of
from system.plan.hardware import GPUS
from system.plan.memory import learner_memory
from system.plan.plan import filled
from system.plan.units import count, parameter_count
from system.sft.prepare import learner_config


def supervised_plan(config: Config, *, gpu: str = "h100") -> tuple[str, bool]:
    """How ``espalier sft`` would use the learner's GPUs, in lines; and whether that fits.

    Raises :class:`ConfigError` for an unknown model or GPU.
    """
    if gpu not in GPUS:
        raise ConfigError(f"GPU {gpu!r} is not known; known: {', '.join(GPUS)}")
    shape, learn, one = shape_of(config.model), config.learn, GPUS[gpu]
    longest = max(learn.micro_tokens, config.sft.max_tokens or config.engine.max_context)
    told = replace(learner_config(config).learn, micro_tokens=longest)
    memory = learner_memory(shape, told, config.model.dtype, one.reserved)
    lines = [
        f"{shape.name}: {parameter_count(shape.parameters)} parameters",
        f"learner  {count(learn.ranks, 'GPU')} ({one.name}): tp {learn.tp} · pp {learn.pp} · cp {learn.cp} · "
        f"dp {learn.dp}, {config.model.dtype}, rows of up to {longest:,} tokens; no engines beside it",
        filled(memory, one.memory),
    ]
    if fits := memory.total <= one.memory:
        return "\n".join(lines), fits
    remedies = "learn.recompute=full, learn.distributed_optimizer=true, a higher learn.tp or learn.pp"
    return "\n".join([*lines, f"PROBLEM: a learner rank does not fit: {remedies}"]), fits
