"""Settings that are set and do nothing beside the others: told at the start, for they may be meant."""

from __future__ import annotations

from collections.abc import Iterator

from system.config.schema import Config
from system.config.schema_learn import LearnConfig
from system.config.schema_lora import PARTS


def without_effect(config: Config) -> Iterator[str]:
    """A line each.  (Of clips that do nothing :func:`system.learn.objective.inert_clip` tells.)"""
    learn, usual, engine = config.learn, LearnConfig(), config.engine
    if learn.teacher != "average" and learn.teacher_decay != usual.teacher_decay:
        yield (
            f"learn.teacher_decay={learn.teacher_decay:g} will do nothing: it is of the average of "
            f"learn.teacher=average, and learn.teacher={learn.teacher}"
        )
    if learn.teacher == "none" and learn.teacher_coef != usual.teacher_coef:
        yield f"learn.teacher_coef={learn.teacher_coef:g} will do nothing: learn.teacher=none"
    yield from without_rank(config)
    if engine.urls and engine.sglang:
        yield (
            f"engine.sglang ({', '.join(map(str, engine.sglang))}) will do nothing: the servers of "
            "engine.urls run already, with flags of their own"
        )
    if config.cluster.fork == "true" and (config.cluster.address or config.cluster.gpus_per_node):
        yield "cluster.fork=true will do nothing: only actors of this machine alone, on its CPU, are forked"
    if config.cluster.ray_agents and config.cluster.address:
        yield "cluster.ray_agents=true will do nothing: the Ray of cluster.address has started its own"


def without_rank(config: Config) -> Iterator[str]:
    """What is said of adapters where there are none; also of supervised runs, with nothing else."""
    lora, usual = config.learn.lora, LearnConfig().lora
    if lora.on:  # else a baseline, say: a sweep over ranks has 0 among them
        return
    for name in ("alpha", "targets", "sync"):
        value = getattr(lora, name)
        if value not in (getattr(usual, name), [*PARTS]):  # all: the default of older runs
            yield f"learn.lora.{name}={value} will do nothing: learn.lora.rank=0 trains the whole model"
