"""Before a job is submitted: how GPUs are shared out, what fills their memory, what will limit the run.

:func:`plan` is arithmetic on the configuration (no torch, no allocation); :func:`text` is what ``espalier
plan`` prints.  The memory model is in ``memory.py``, the speed model in ``speed.py``, the assumptions in
``hardware.py``; ``espalier bench scale`` puts the same speeds under the real control flow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from system.config import Config, ConfigError
from system.config.lora import adapters_travel
from system.config.schema_lora import PARTS
from system.learn.expert_layout import expert_problems
from system.learn.sizes import context_block
from system.models.known import shape_of
from system.models.shape import ModelShape
from system.plan.hardware import GIB, GPUS, NODE, Gpu
from system.plan.memory import (
    EngineLayout,
    Memory,
    adapted,
    adapter_parameters,
    engine_layout,
    engine_memory,
    host_memory,
    kv_capacity,
    learner_memory,
)
from system.plan.speed import EngineRoofline, LearnerRoofline, PublishRoofline
from system.plan.units import byte_size, count, duration, parameter_count
from system.plan.workload import AgentWorkload

GENERATION, TRAINING, TOOLS, KV = "generation", "training", "tool latency", "room in the engines"
FEW = 16  # sequences of one engine, below which a step costs hardly less than one of so many


@dataclass(frozen=True, slots=True)
class Forecast:
    """One training step in mean values: no tail, no queueing (``espalier bench scale`` simulates those)."""

    generate_s: float  # engines alone, for one batch
    train_s: float  # learner alone, for one batch
    mfu: float  # of the learner's GPUs, while it trains and none of them waits
    stage_s: float  # weights are made ready for engines, which generate
    pause_s: float  # engines stand still and take them
    refill_s: float  # engines compute the keys and values of running contexts again under new weights
    staleness: int  # 0: engines and learner take turns
    branches: float  # in flight over all engines
    ready: float  # of them those that do not wait for a tool
    held: float  # branches that engines decode at once, at most
    capped: bool  # by engine.max_running, before their KV caches are full
    running: float  # branches decoding at once on one engine
    decode_per_s: float  # tokens per second, all engines
    decode_s: float  # of one branch
    tools_s: float  # of one branch

    @property
    def publish_s(self) -> float:
        return self.stage_s + self.pause_s

    @property
    def learn_s(self) -> float:
        return self.train_s + self.publish_s

    @property
    def engines_s(self) -> float:
        """Of engines that generate a batch and take new weights meanwhile."""
        return self.generate_s + self.pause_s + self.refill_s

    @property
    def step_s(self) -> float:
        """Engines and learner together, as the staleness allows."""
        if self.staleness == 0:
            return self.generate_s + self.learn_s
        return max(self.engines_s, self.learn_s)

    @property
    def engines_idle(self) -> float:
        """Share of an engine's time: the learner's turn, and while none of its branches decodes.

        Branches wait for their tools independently of each other, so the number that decode is Poisson's.
        """
        busy = self.generate_s * (1 - math.exp(-self.running))
        return 1 - (busy + self.refill_s) / self.step_s

    @property
    def learner_idle(self) -> float:
        """Share of the learner's time."""
        return 1 - self.train_s / self.step_s

    @property
    def bottleneck(self) -> str:
        """What limits a step."""
        if self.learn_s > (self.engines_s if self.staleness else self.generate_s):
            return TRAINING
        if self.ready > self.held:
            return KV
        return TOOLS if self.tools_s > self.decode_s else GENERATION

    @property
    def because(self) -> str:
        """Why that limits a step, and what would mend it."""
        generate, learn = duration(self.generate_s), duration(self.learn_s)
        if self.bottleneck == TRAINING:
            return (
                f"a batch takes {learn} to train and publish, {generate} to generate: give the learner more "
                "GPUs"
            )
        if self.bottleneck == KV and self.capped:
            return (
                f"{self.ready:,.0f} branches want to decode, engine.max_running lets {self.held:,.0f}: raise "
                "it, or give the engines more GPUs"
            )
        if self.bottleneck == KV:
            return (
                f"{self.ready:,.0f} branches want to decode, the engines' KV cache holds {self.held:,.0f}: "
                "more engine GPUs, or more of them per engine"
            )
        if self.bottleneck == TOOLS:
            return (
                f"a branch waits {duration(self.tools_s)} for tools and decodes {duration(self.decode_s)}, "
                f"so that {self.running:,.1f} sequences decode at a time on an engine: raise "
                "rollout.concurrency and flow.staleness, so that others decode meanwhile"
            )
        why, remedy = f"{self.running:,.0f} sequences decode per engine", "give the engines more GPUs"
        if self.running < FEW:
            why = (
                f"only {self.running:.1f} sequences decode per engine, so each step reads all weights for "
                "few tokens"
            )
            remedy = "raise flow.batch_leaves, flow.staleness or rollout.concurrency, or use fewer engines"
        mode = " (η = 0: engines and learner take turns)" if self.staleness == 0 else ""
        return f"{why}; a batch takes {generate} to generate, {learn} to train and publish{mode}: {remedy}"


@dataclass(frozen=True)
class GpuPlan:
    """How ``gpus`` are used: memory, speed, and what is wrong with it."""

    config: Config
    gpus: int
    gpu: Gpu
    workload: AgentWorkload
    shape: ModelShape
    engine: EngineLayout
    engines: int

    @property
    def row_tokens(self) -> int:
        """Of the learner's longest row."""
        return row_tokens(self.config)

    @cached_property
    def learner_memory(self) -> Memory:
        learn = replace(self.config.learn, micro_tokens=self.row_tokens)
        return learner_memory(self.shape, learn, self.config.model.dtype, self.gpu.reserved)

    @cached_property
    def host_memory(self) -> Memory:
        """Of one learner rank."""
        return host_memory(self.shape, self.config.learn, self.config.model.dtype)

    @cached_property
    def engine_memory(self) -> Memory:
        return engine_memory(self.shape, self.engine, self.gpu.memory)

    @cached_property
    def kv_tokens(self) -> int:
        """Per engine."""
        return kv_capacity(self.shape, self.engine, self.gpu.memory)

    @property
    def fits(self) -> bool:
        return not self.problems

    @cached_property
    def problems(self) -> list[str]:
        """Why it would fail, each with the remedy."""
        shape, learn, rank = self.shape, self.config.learn, self.learner_memory
        problems = [
            f"learn.tp={learn.tp} does not divide the model's {name}={size}"
            for name, size in shape.divided(whole_experts=learn.ep > 1).items()
            if size % learn.tp
        ]
        problems += expert_problems(shape, learn)
        if shape.layers % learn.pp:
            problems.append(f"learn.pp={learn.pp} does not divide the model's {shape.layers} layers")
        least = learn.cp * context_block(learn.tp, learn.sequence_parallel, gpu=True)
        if learn.cp > 1 and learn.micro_tokens < least:
            problems.append(
                f"learn.micro_tokens={learn.micro_tokens} have no block for each of the learn.cp={learn.cp} "
                f"ranks: raise it to {least} or more, or lower learn.cp"
            )
        if uneven(shape, self.engine.tp):
            widths = " and ".join(f"{name}={size}" for name, size in shape.divided().items() if "ffn" in name)
            problems.append(
                f"engine.tp={self.engine.tp} does not divide the model's heads={shape.heads} and {widths}, "
                f"or neither divides kv_heads={shape.kv_heads} nor is a multiple of it"
            )
        if self.engine.tp > self.node:
            problems.append(
                f"engine.tp={self.engine.tp}: an engine lies on one node, which has {self.node} GPUs "
                "(cluster.gpus_per_node): lower it"
            )
        if rank.total > self.gpu.memory:
            relief = (  # the cheapest first
                (
                    "learn.distributed_optimizer=true",
                    learn.cp * learn.dp > 1 and not learn.distributed_optimizer,
                ),
                ("learn.sequence_parallel=true", learn.tp > 1 and not learn.sequence_parallel),
                ("learn.recompute=full", learn.recompute != "full"),
                ("learn.offload=true", not learn.offload),
                ("a higher learn.tp, learn.pp or learn.cp", True),
            )
            problems.append(
                f"a learner rank needs {rank.total / GIB:.0f} GiB and has {self.gpu.memory / GIB:.0f}: "
                f"{' or '.join(name for name, helps in relief if helps)} or a lower "
                + ("learn.micro_tokens" if self.row_tokens == learn.micro_tokens else "engine.max_context")
            )
        if self.kv_tokens < self.config.engine.max_context:
            problems.append(
                f"an engine of {self.engine.tp} GPU(s) holds {self.kv_tokens:,} tokens of KV, less than one "
                f"context of engine.max_context={self.config.engine.max_context:,}: raise engine.tp, or "
                f"engine.sglang.mem_fraction_static (it is {self.engine.memory_share:g})"
            )
        return problems

    @property
    def notes(self) -> list[str]:
        """What does not use these GPUs well."""
        flow, learn = self.config.flow, self.config.learn
        trees = flow.batch_leaves // self.config.rollout.leaves // learn.updates
        few = f"learn.dp={learn.dp} is more than the {count(trees, 'tree')} of an update: lower it"
        engine = self.config.engine
        slow = f"weights are published as by engine.weights=distributed, not as by {engine.weights}"
        other = engine.name == "sglang" and engine.weights not in ("auto", "distributed")
        known, context = self.shape.max_position, engine.max_context
        far = f"engine.max_context={context:,} needs a model of {context:,} positions, not of {known:,}"
        told = ((few, learn.dp > trees), (slow, other), (far, context > known))
        return [*(note for note, true in told if true), *self._spare_engines]

    @property
    def _spare_engines(self) -> list[str]:
        engines, replicas = self.engines, self.config.engine.replicas
        decoding = self.forecast.running * engines
        if (enough := max(1, math.ceil(decoding / FEW))) < engines:
            few = f"{decoding:.0f} branches decode" if decoding >= 1.5 else "one branch decodes"
            return [
                f"about {few} at a time: {count(enough, 'engine')} would do, "
                f"{count(self.config.learn.ranks + enough * self.engine.tp, 'GPU')} in all"
            ]
        if replicas == engines:
            return []
        fit = f"{count(engines, 'engine')} fit{'s' * (engines == 1)}"
        return [f"{fit}: set engine.replicas={engines} (it is {replicas})"]

    @property
    def node(self) -> int:
        """GPUs of a machine."""
        return self.config.cluster.gpus_per_node or NODE

    @property
    def one_node(self) -> bool:
        """Whether learner and engines share a machine, and with it NVLink."""
        return self.gpus <= self.node

    @property
    def sent_bytes(self) -> float:
        """That leave the learner with each version of the weights."""
        return self._published(self.gpu).size

    @property
    def copies(self) -> bool:
        """Whether rank 0 holds a whole version at a time, until all servers have it."""
        engine, apart = self.config.engine, adapters_travel(self.config)
        return engine.name == "sglang" and engine.weights != "disk" and not apart

    def _published(self, gpu: Gpu) -> PublishRoofline:
        apart = adapters_travel(self.config)
        return PublishRoofline(self.shape, self.config.learn, self.engine, gpu, self.one_node, apart)

    @cached_property
    def forecast(self) -> Forecast:
        flow, rollout, work, engines = self.config.flow, self.config.rollout, self.workload, self.engines
        learn, roof = self.config.learn, EngineRoofline(self.shape, self.engine, self.gpu)
        wanted = min(rollout.concurrency * rollout.leaves, (flow.staleness + 1) * flow.batch_leaves)
        context = work.prompt_tokens + work.response_tokens / 2
        room = max(1.0, self.kv_tokens / context)
        held = min(room, self.config.engine.max_running) * engines
        # Little's law: of the branches in flight those decode that do not wait for a tool.
        ready, tools_s = float(wanted), work.calls * work.tool_s
        tokens = work.response_tokens * (1 - work.tool_share)
        decode_s = 0.0
        for _ in range(50):  # to the fixed point: the more decode, the slower each step
            each = max(1.0, min(ready, held) / engines)
            decode_s = tokens * roof.step_s(each, each * context)
            ready = 0.5 * ready + 0.5 * wanted * decode_s / (decode_s + tools_s)
        decoding = min(ready, held)
        each = max(decoding / engines, 1.0)
        rate = decoding / roof.step_s(each, each * context)
        trees = flow.batch_leaves / rollout.leaves
        fresh = trees * work.prompt_tokens + flow.batch_leaves * work.response_tokens * work.tool_share
        packed = flow.batch_leaves * work.packed + trees * work.prompt_tokens
        if learn.objective.name == "grpo-flat":  # paths, each by itself
            packed = flow.batch_leaves * (work.prompt_tokens + work.response_tokens)
        sglang = self.config.engine.name == "sglang"  # the embedded engine goes over between two steps
        gpu = self.gpu if sglang else replace(self.gpu, bucket_s=0.0, swap_s=0.0)
        trainer = LearnerRoofline(self.shape, learn, self.gpu, context, self.node)
        publish = self._published(gpu)
        # Siblings' shared contexts are in an engine's cache once.
        again = min(wanted, held) * context * (1 - work.shared)
        # A turn under adapters of another version takes nothing from the cache, whatever that setting says.
        kept = self.config.engine.kv_after_update == "keep" and not publish.adapters
        refills = flow.staleness > 0 and not kept
        return Forecast(
            generate_s=flow.batch_leaves * work.generated / rate + roof.prefill_s(fresh) / engines,
            train_s=trainer.train_s(packed),
            mfu=trainer.mfu,
            stage_s=publish.stage_s,
            pause_s=publish.pause_s,
            refill_s=refills * roof.prefill_s(again) / engines,
            staleness=flow.staleness,
            branches=wanted,
            ready=ready,
            held=held,
            capped=room > self.config.engine.max_running,
            running=decoding / engines,
            decode_per_s=rate,
            decode_s=decode_s,
            tools_s=tools_s,
        )


def uneven(shape: ModelShape, tp: int) -> bool:
    """Whether SGLang cannot split the model over ``tp`` GPUs: it copies key and value heads, nothing else."""
    sizes = shape.divided()
    kv_heads = sizes.pop("kv_heads")
    return any(size % tp for size in sizes.values()) or bool(kv_heads % tp and tp % kv_heads)


def row_tokens(config: Config) -> int:
    """Of the learner's longest row: a path that exceeds ``learn.micro_tokens`` is one by itself."""
    return max(config.learn.micro_tokens, config.engine.max_context)


def plan(
    config: Config,
    gpus: int | None = None,
    *,
    gpu: str = "h100",
    workload: AgentWorkload | None = None,
    engines: int | None = None,
) -> GpuPlan:
    """Lay ``config`` out over ``gpus`` GPUs (None: as many as the configuration names).

    The learner takes tp · pp · cp · dp of them, engines of ``engine.tp`` GPUs the rest (or ``engines`` of
    them, where less than the rest will do).  Raises
    :class:`ConfigError` for an unknown model or GPU, and when there are too few GPUs for a learner and one
    engine.
    """
    if gpu not in GPUS:
        raise ConfigError(f"GPU {gpu!r} is not known; known: {', '.join(GPUS)}")
    shape, taken = shape_of(config.model), config.learn.ranks
    engine = engine_layout(config)
    if gpus is None:
        gpus = named_gpus(config)
    engines = engines or (gpus - taken) // engine.tp
    if engines < 1:
        raise ConfigError(
            f"{gpus} GPUs: the learner takes {taken} (learn.tp · pp · cp · dp) and an engine {engine.tp}; "
            "give more GPUs or a smaller learner"
        )
    workload = workload or AgentWorkload.guess(config)
    return GpuPlan(config, gpus, GPUS[gpu], workload, shape, engine, engines)


def named_gpus(config: Config) -> int:
    """GPUs of the nodes that the configuration asks for, or of its learner and engines."""
    on_cluster = config.cluster.nodes * config.cluster.gpus_per_node
    return on_cluster or (
        config.learn.ranks + (config.engine.replicas + config.eval.engines) * config.engine.tp
    )


def text(plan: GpuPlan) -> str:
    """The plan in about thirty lines."""
    p, learn, work = plan, plan.config.learn, plan.workload
    forecast = p.forecast
    whole = f" (ep {learn.ep})" if learn.ep > 1 else ""
    split = f"tp {learn.tp} · pp {learn.pp} · cp {learn.cp} · dp {learn.dp}{whole}, {p.config.model.dtype}"
    lines = [
        f"{p.shape.name}: {parameter_count(p.shape.parameters)} parameters, on {p.gpus} x {p.gpu.name} "
        f"({byte_size(p.gpu.memory)} each)",
        "",
        f"learner  {count(learn.ranks, 'GPU')}: {split}, micro-batches of up to {p.row_tokens:,} tokens"
        + (f", recompute {learn.recompute}" if learn.recompute != "none" else "")
        + (", sequence parallel" if learn.sequence_parallel else "")
        + (", distributed optimizer" if learn.distributed_optimizer else ""),
        *([_lora(p)] if learn.lora.on else []),
        filled(p.learner_memory, p.gpu.memory),
        *([f"  {byte_size(p.host_memory.total)} of host memory per GPU: optimizer"] if learn.offload else []),
        *([f"  {byte_size(p.sent_bytes)} more at rank 0, on its GPU or host: weights to send"] * p.copies),
        "",
        f"engines  {p.engines}, of {count(p.engine.tp, 'GPU')} each" + p.engine.told,
        filled(p.engine_memory, p.gpu.memory),
        f"  {p.kv_tokens:,} tokens of KV cache per engine",
        "",
        f"forecast, with {forecast.branches:,.0f} branches in flight",
        f"  assumed per branch: prompt {work.prompt_tokens:,.0f}, response {work.response_tokens:,.0f} "
        f"tokens, {work.calls:g} tool calls of {work.tool_s:g} s, {work.shared:.0%} of a path shared",
        f"  generating a batch {duration(forecast.generate_s)} ({forecast.decode_per_s:,.0f} tokens/s, "
        f"{forecast.running:.1f} sequences decoding per engine)",
        f"  training on it {duration(forecast.train_s)} (MFU {forecast.mfu:.0%}), publishing weights "
        f"{duration(forecast.publish_s)} ({_taken(p)})",
        f"  a step every {duration(forecast.step_s)}; engines idle {forecast.engines_idle:.0%}, "
        f"learner idle {forecast.learner_idle:.0%}",
        f"  bottleneck: {forecast.bottleneck}: {forecast.because}",
    ]
    lines += ["", *(f"PROBLEM: {problem}" for problem in p.problems)] if p.problems else []
    lines += [f"note: {note}" for note in p.notes]
    return "\n".join(lines)


def _taken(plan: GpuPlan) -> str:
    again, pause = duration(plan.forecast.refill_s), duration(plan.forecast.pause_s)
    if adapters_travel(plan.config):
        return f"no engine pauses; contexts computed again under new adapters, turn by turn: {again}"
    return f"engines pause {pause}, then compute running contexts again: {again}"


def _lora(plan: GpuPlan) -> str:
    lora, adapters = plan.config.learn.lora, adapter_parameters(plan.shape, plan.config.learn)
    targets = (target for target, part in PARTS.items() if part in adapted(plan.shape, plan.config.learn))
    how = "adapters alone" if adapters_travel(plan.config) else "merged, all weights"
    return (
        f"  LoRA of rank {lora.rank} on {', '.join(targets)}: {parameter_count(adapters)} numbers are "
        f"trained; {byte_size(plan.sent_bytes)} a version travel ({how})"
    )


def filled(memory: Memory, available: float) -> str:
    """What fills a GPU's memory, in a line."""
    parts = ", ".join(f"{name} {byte_size(size)}" for name, size in memory.parts.items())
    return f"  {byte_size(memory.total)} of {byte_size(available)} per GPU: {parts}"
