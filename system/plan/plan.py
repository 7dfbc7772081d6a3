"""Before a job is submitted: how GPUs are shared out, what fills their memory, what will limit the run.

:func:`plan` is arithmetic on the configuration (no torch, no allocation); :func:`text` is what ``espalier
plan`` prints.  The memory model is in ``memory.py``, the speed model in ``speed.py``, the assumptions in
``hardware.py``; ``espalier bench scale`` puts the same speeds under the real control flow.
"""

from __future__ import annotations

from dataclasses import dataclass

from system.config import Config, ConfigError
from system.models.known import shape_of
from system.models.shape import ModelShape
from system.plan.hardware import GIB, GPUS, Gpu
from system.plan.memory import (
    EngineLayout,
    LearnerLayout,
    Memory,
    engine_memory,
    kv_capacity,
    learner_memory,
)
from system.plan.speed import EngineRoofline, LearnerRoofline, publish_s

GENERATION, TRAINING, TOOLS, KV = "generation", "training", "tool latency", "KV cache"


@dataclass(frozen=True, slots=True)
class AgentWorkload:
    """What the agent does, on average per branch.  Guesses until a run has measured it."""

    prompt_tokens: float = 512.0
    response_tokens: float = 2048.0  # model and tool tokens after the prompt, of one leaf's path
    tool_share: float = 0.25  # of those, tokens that tools wrote
    calls: float = 2.0  # tool calls
    tool_s: float = 1.0  # seconds per call
    shared: float = 0.3  # share of a leaf's path that siblings have computed already

    @classmethod
    def guess(cls, config: Config) -> AgentWorkload:
        """Half the response budget and half the call limit; sharing only where trees fork."""
        rollout = config.rollout
        return cls(
            response_tokens=rollout.max_response_tokens / 2,
            calls=rollout.call_limit / 2,
            shared=0.3 if config.branching.name != "none" else 0.0,
        )

    @property
    def generated(self) -> float:
        """Tokens that the model has to sample for one more leaf."""
        return self.response_tokens * (1 - self.tool_share) * (1 - self.shared)

    @property
    def packed(self) -> float:
        """Tokens that the learner computes for one more leaf; the prompt is counted with the tree."""
        return self.response_tokens * (1 - self.shared)


@dataclass(frozen=True, slots=True)
class Forecast:
    """One training step in seconds, and what limits it."""

    generate_s: float  # engines alone, for one batch
    train_s: float  # learner alone, for one batch
    publish_s: float
    step_s: float  # both together, as the staleness allows
    branches: float  # branches in flight over all engines
    running: float  # of them decoding at once on one engine
    decode_per_s: float  # tokens per second, all engines
    bottleneck: str
    because: str

    @property
    def engine_idle(self) -> float:
        """Share of time in which the engines have nothing to generate."""
        return max(0.0, 1 - self.generate_s / self.step_s)

    @property
    def learner_idle(self) -> float:
        return max(0.0, 1 - self.train_s / self.step_s)


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """How ``gpus`` are used."""

    shape: ModelShape
    gpu: Gpu
    gpus: int
    learner: LearnerLayout
    engine: EngineLayout
    engines: int
    learner_memory: Memory
    engine_memory: Memory
    kv_tokens: int  # per engine
    workload: AgentWorkload
    forecast: Forecast
    problems: tuple[str, ...] = ()  # why it would fail, with the remedy; empty: it fits
    notes: tuple[str, ...] = ()  # settings that do not use these GPUs well

    @property
    def fits(self) -> bool:
        return not self.problems


def plan(
    config: Config,
    gpus: int | None = None,
    *,
    gpu: str = "h100",
    workload: AgentWorkload | None = None,
) -> GpuPlan:
    """Lay ``config`` out over ``gpus`` GPUs (None: as many as the configuration names).

    The learner takes tp · pp · cp · dp of them, engines of ``engine.tp`` GPUs the rest.  Raises
    :class:`ConfigError` for an unknown model or GPU, and when there are too few GPUs for a learner and one
    engine.
    """
    if gpu not in GPUS:
        raise ConfigError(f"GPU {gpu!r} is not known; known: {', '.join(GPUS)}")
    card, shape = GPUS[gpu], shape_of(config.model)
    learner = learner_layout(config)
    engine = EngineLayout(tp=config.engine.tp, dtype=config.model.dtype)
    if gpus is None:
        on_cluster = config.cluster.nodes * config.cluster.gpus_per_node
        gpus = on_cluster or learner.gpus + config.engine.replicas * engine.tp
    engines = (gpus - learner.gpus) // engine.tp
    if engines < 1:
        raise ConfigError(
            f"{gpus} GPUs: the learner takes {learner.gpus} (learn.tp · pp · dp) and an engine {engine.tp}; "
            "give more GPUs or a smaller learner"
        )
    workload = workload or AgentWorkload.guess(config)
    rank = learner_memory(shape, learner, card.reserved)
    forecast = _forecast(config, card, shape, learner, engine, engines, workload)
    return GpuPlan(
        shape=shape,
        gpu=card,
        gpus=gpus,
        learner=learner,
        engine=engine,
        engines=engines,
        learner_memory=rank,
        engine_memory=engine_memory(shape, engine, card.memory),
        kv_tokens=kv_capacity(shape, engine, card.memory),
        workload=workload,
        forecast=forecast,
        problems=tuple(_problems(config, shape, card, learner, engine, rank)),
        notes=tuple(_notes(config, engines)),
    )


def learner_layout(config: Config) -> LearnerLayout:
    learn = config.learn
    return LearnerLayout(
        tp=learn.tp,
        pp=learn.pp,
        dp=learn.dp,
        micro_tokens=learn.micro_tokens,
        dtype=config.model.dtype,
        sequence_parallel=learn.sequence_parallel,
        recompute=learn.recompute,
        distributed_optimizer=learn.distributed_optimizer,
        reference=learn.kl_coef > 0,
    )


def _problems(
    config: Config, shape: ModelShape, gpu: Gpu, learner: LearnerLayout, engine: EngineLayout, rank: Memory
) -> list[str]:
    problems: list[str] = []
    for name in ("heads", "kv_heads", "ffn"):
        if getattr(shape, name) % learner.tp:
            problems.append(
                f"learn.tp={learner.tp} does not divide the model's {name}={getattr(shape, name)}"
            )
    if shape.layers % learner.pp:
        problems.append(f"learn.pp={learner.pp} does not divide the model's {shape.layers} layers")
    if rank.total > gpu.memory:
        problems.append(
            f"a learner rank needs {rank.total / GIB:.0f} GiB and has {gpu.memory / GIB:.0f}: "
            + _relief(learner)
        )
    held, longest = kv_capacity(shape, engine, gpu.memory), config.engine.max_context
    if held < longest:
        problems.append(
            f"an engine of {engine.tp} GPU(s) holds {held:,} tokens of KV, less than one context of "
            f"engine.max_context={longest:,}: raise engine.tp"
        )
    return problems


def _relief(learner: LearnerLayout) -> str:
    """What would make a learner rank smaller, the cheapest first."""
    unused = (
        ("learn.distributed_optimizer=true", learner.dp > 1 and not learner.distributed_optimizer),
        ("learn.sequence_parallel=true", learner.tp > 1 and not learner.sequence_parallel),
        ("learn.recompute=full", learner.recompute != "full"),
    )
    switches = [name for name, helps in unused if helps]
    return f"{' or '.join([*switches, 'a higher learn.tp or learn.pp'])} or a lower learn.micro_tokens"


def _notes(config: Config, engines: int) -> list[str]:
    if config.engine.replicas == engines:
        return []
    return [f"{engines} engines fit: set engine.replicas={engines} (it is {config.engine.replicas})"]


def _forecast(
    config: Config,
    gpu: Gpu,
    shape: ModelShape,
    learner: LearnerLayout,
    engine: EngineLayout,
    engines: int,
    work: AgentWorkload,
) -> Forecast:
    """Mean values only: no tail, no queueing.  ``espalier bench scale`` simulates those."""
    flow, rollout = config.flow, config.rollout
    roof = EngineRoofline(shape, engine, gpu)
    admitted = (flow.staleness + 1) * flow.batch_leaves
    wanted = min(rollout.concurrency * rollout.leaves, admitted)
    context = work.prompt_tokens + work.response_tokens / 2
    by_memory = max(1.0, roof.kv_tokens / context) * engines
    # Little's law: of the branches in flight those decode that do not wait for a tool.
    running, tools_s = float(wanted), work.calls * work.tool_s
    tokens = work.response_tokens * (1 - work.tool_share)
    decoding_s = 0.0
    for _ in range(50):  # to the fixed point: the more decode, the slower each step
        each = max(1.0, min(running, by_memory) / engines)
        decoding_s = tokens * roof.step_s(each, each * context)
        running = 0.5 * running + 0.5 * wanted * decoding_s / (decoding_s + tools_s)
    decoding = min(running, by_memory)
    each = decoding / engines
    rate = decoding / roof.step_s(max(each, 1.0), max(each, 1.0) * context)
    trees = flow.batch_leaves / rollout.leaves
    fresh = trees * work.prompt_tokens + flow.batch_leaves * work.response_tokens * work.tool_share
    prefill_s = roof.prefill_s(fresh) / engines
    generate_s = flow.batch_leaves * work.generated / rate + prefill_s
    train_s = LearnerRoofline(shape, learner, gpu).train_s(
        flow.batch_leaves * work.packed + trees * work.prompt_tokens
    )
    pushing_s = publish_s(shape, gpu)
    learning_s = train_s + pushing_s
    step_s = generate_s + learning_s if flow.staleness == 0 else max(generate_s, learning_s)
    bottleneck, because = _bottleneck(
        generate_s, learning_s, running, by_memory, tools_s, decoding_s, each, flow.staleness
    )
    return Forecast(generate_s, train_s, pushing_s, step_s, wanted, each, rate, bottleneck, because)


def _bottleneck(
    generate_s: float,
    learning_s: float,
    running: float,
    by_memory: float,
    tools_s: float,
    decoding_s: float,
    each: float,
    staleness: int,
) -> tuple[str, str]:
    if learning_s > generate_s:
        return TRAINING, (
            f"a batch takes {learning_s:.1f} s to train and publish, {generate_s:.1f} s to generate: "
            "give the learner more GPUs"
        )
    if running > by_memory:
        return KV, (
            f"{running:,.0f} branches want to decode, the engines' KV cache holds {by_memory:,.0f}: "
            "more engine GPUs, or more of them per engine"
        )
    if tools_s > decoding_s:
        return TOOLS, (
            f"a branch waits {tools_s:.1f} s for tools and decodes {decoding_s:.1f} s: "
            "raise rollout.concurrency and flow.staleness, so that others decode meanwhile"
        )
    few = each < 16
    remedy = (
        "raise flow.batch_leaves, flow.staleness or rollout.concurrency, or use fewer engines"
        if few
        else "give the engines more GPUs"
    )
    why = (
        f"only {each:.1f} sequences decode per engine, so each step reads all weights for few tokens"
        if few
        else f"{each:,.0f} sequences decode per engine"
    )
    mode = " (η = 0: engines and learner take turns)" if staleness == 0 else ""
    times = f"a batch takes {generate_s:.1f} s to generate, {learning_s:.1f} s to train and publish"
    return GENERATION, f"{why}; {times}{mode}: {remedy}"


def text(plan: GpuPlan) -> str:
    """The plan in about thirty lines."""
    p, forecast, work = plan, plan.forecast, plan.workload
    learner = p.learner
    split = f"tp {learner.tp} · pp {learner.pp} · cp {learner.cp} · dp {learner.dp}"
    lines = [
        f"{p.shape.name}: {p.shape.parameters / 1e9:.3g} billion parameters, on {p.gpus} x {p.gpu.name} "
        f"({p.gpu.memory / GIB:.0f} GiB)",
        "",
        f"learner  {learner.gpus} GPU(s): {split}, {learner.dtype}, micro-batches of {learner.micro_tokens} "
        "tokens"
        + (f", recompute {learner.recompute}" if learner.recompute != "none" else "")
        + (", sequence parallel" if learner.sequence_parallel else "")
        + (", distributed optimizer" if learner.distributed_optimizer else ""),
        *_memory_lines(p.learner_memory, p.gpu.memory),
        "",
        f"engines  {p.engines} of {p.engine.tp} GPU(s) each",
        *_memory_lines(p.engine_memory, p.gpu.memory),
        f"  {p.kv_tokens:,} tokens of KV cache per engine",
        "",
        f"forecast, with {forecast.branches:,.0f} branches in flight",
        f"  assumed per branch: prompt {work.prompt_tokens:,.0f}, response {work.response_tokens:,.0f} "
        f"tokens, {work.calls:g} tool calls of {work.tool_s:g} s, {work.shared:.0%} of a path shared",
        f"  generating a batch {forecast.generate_s:.1f} s ({forecast.decode_per_s:,.0f} tokens/s, "
        f"{forecast.running:.1f} sequences per engine)",
        f"  training on it {forecast.train_s:.1f} s, publishing weights {forecast.publish_s:.1f} s",
        f"  a step every {forecast.step_s:.1f} s; engines idle {forecast.engine_idle:.0%}, "
        f"learner idle {forecast.learner_idle:.0%}",
        f"  bottleneck: {forecast.bottleneck}: {forecast.because}",
    ]
    lines += ["", *(f"PROBLEM: {problem}" for problem in p.problems)] if p.problems else []
    lines += [f"note: {note}" for note in p.notes]
    return "\n".join(lines)


def _memory_lines(memory: Memory, available: float) -> list[str]:
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in memory.parts.items())
    return [f"  {memory.total / GIB:.1f} of {available / GIB:.1f} GiB per GPU: {parts}"]
