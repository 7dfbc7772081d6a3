"""``espalier plan --search``: the fastest layout that fits, of all that these GPUs allow.

Every layout is planned as ``espalier plan`` would, and ranked by the seconds of a training step; of layouts
alike the one with fewer parts comes first, then the one with more memory left.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from system.config import Config, ConfigError
from system.learn.sizes import BLOCK
from system.models.experts import Experts
from system.models.known import shape_of
from system.plan.hardware import GIB, NODE
from system.plan.plan import GpuPlan, plan, row_tokens, uneven
from system.plan.units import count, duration
from system.plan.workload import AgentWorkload

ALIKE = 0.05  # steps that differ by less are equally fast, as far as a roofline knows
FULL = 0.95  # of a GPU's memory: the rest is for what the allocator cannot use
SHOWN = 5
WIDTHS = (1, 2, 4, 8, 16)
SHARE = 16_384  # tokens of the longest row that a context-parallel rank has at least


@dataclass(frozen=True, slots=True)
class Candidate:
    """What the search may choose.  The optimizer's state lies on the GPUs (``learn.offload=false``)."""

    tp: int
    pp: int
    cp: int
    dp: int
    recompute: str
    engine_tp: int
    engines: int
    nodes: int
    learner_nodes: int  # 0: learner and engines share a node
    ep: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def parts(self) -> int:
        """How much talks to each other for one step."""
        return self.tp * self.cp * self.pp * self.pp + self.engine_tp

    def settings(self, config: Config) -> list[str]:
        """What has to be set for it."""
        learn = {
            "tp": self.tp,
            "pp": self.pp,
            "cp": self.cp,
            "dp": self.dp,
            "ep": self.ep,
            "sequence_parallel": str(self.tp > 1).lower(),
            "distributed_optimizer": str(self.cp * self.dp > 1).lower(),
            "recompute": self.recompute,
            "offload": "false",
        }
        words = [f"learn.{name}={value}" for name, value in learn.items()]
        words += [f"engine.tp={self.engine_tp}", f"engine.replicas={self.engines}"]
        if config.cluster.gpus_per_node:
            words += [f"cluster.nodes={self.nodes}", f"cluster.learner_nodes={self.learner_nodes}"]
        return words

    def of(self, config: Config) -> Config:
        """``config``, laid out so."""
        learn = replace(
            config.learn,
            tp=self.tp,
            pp=self.pp,
            cp=self.cp,
            dp=self.dp,
            ep=self.ep,
            recompute=self.recompute,
            sequence_parallel=self.tp > 1,
            distributed_optimizer=self.cp * self.dp > 1,
            offload=False,
        )
        engine = replace(config.engine, tp=self.engine_tp, replicas=self.engines)
        cluster = config.cluster
        if cluster.gpus_per_node:
            cluster = replace(cluster, nodes=self.nodes, learner_nodes=self.learner_nodes)
        return replace(config, learn=learn, engine=engine, cluster=cluster)


@dataclass(frozen=True, slots=True)
class Found:
    """``best``: the fastest first.  ``refused``: why -> how many layouts."""

    best: list[tuple[Candidate, GpuPlan]]
    tried: int
    fitting: int
    refused: dict[str, int]


def search(config: Config, gpus: int, *, gpu: str = "h100", workload: AgentWorkload | None = None) -> Found:
    """Rank every layout of ``config`` on ``gpus`` GPUs.  Raises :class:`ConfigError` where they are too few
    for a learner and an engine.
    """
    if gpus < 2:
        raise ConfigError(f"{count(gpus, 'GPU')}: a learner and an engine take one each, at least")
    refused: Counter[str] = Counter()
    fitting: list[tuple[Candidate, GpuPlan]] = []
    tried = 0
    for layout in layouts(config, gpus):
        tried += 1
        made = plan(layout.of(config), gpus, gpu=gpu, workload=workload, engines=layout.engines)
        if why := objection(made):
            refused[why] += 1
        else:
            fitting.append((layout, made))
    fastest = min((made.forecast.step_s for _, made in fitting), default=1.0)
    fitting.sort(key=lambda found: _rank(*found, fastest))
    return Found(fitting[:SHOWN], tried, len(fitting), dict(refused.most_common()))


def _rank(layout: Candidate, made: GpuPlan, fastest: float) -> tuple[int, int, float]:
    slower = int(math.log(made.forecast.step_s / fastest) / math.log1p(ALIKE))
    return slower, layout.parts, made.learner_memory.total


def layouts(config: Config, gpus: int) -> Iterator[Candidate]:
    """What can be placed: a learner on nodes of its own, or a part of one node with engines beside it; no
    tensor-parallel group and no engine lies on two nodes.  Context parallelism is tried where paths are long.
    """
    node = config.cluster.gpus_per_node or NODE
    nodes = -(-gpus // node)
    in_a_node = [width for width in WIDTHS if width <= node]
    row, micro = row_tokens(config), config.learn.micro_tokens
    experts = shape_of(config.model).experts
    most = min(row // SHARE, micro // BLOCK) if config.learn.attention != "flash" else 1
    ways = [cp for cp in WIDTHS if cp <= max(1, most)]
    for tp, pp, cp in product(in_a_node, WIDTHS, ways):
        for dp in range(1, gpus // (tp * pp * cp) + 1):
            ranks = tp * pp * cp * dp
            alone = ranks % node == 0
            if ranks >= gpus or not (alone or ranks < node) or node % tp:
                continue
            for engine_tp in in_a_node:
                rest = [node] * ((gpus - ranks) // node) + [(gpus - ranks) % node]
                if engines := sum(free // engine_tp for free in rest):
                    own = ranks // node if alone else 0
                    for recompute, ep in product(
                        ("none", "selective", "full"), _shared(experts, tp, cp * dp)
                    ):
                        yield Candidate(tp, pp, cp, dp, recompute, engine_tp, engines, nodes, own, ep)


def _shared(experts: Experts | None, tp: int, copies: int) -> list[int]:
    """Over how many ranks the experts of a layer may be spread; 1: each is split over the tp ranks."""
    if experts is None:
        return [1]
    wide = [ep for ep in WIDTHS if ep > 1 and ep % tp == 0 == tp * copies % ep]
    return [1, *(ep for ep in wide if experts.count % ep == 0)]


def objection(made: GpuPlan) -> str:
    """Why a layout is refused, in words that are the same for all that are refused for the same reason."""
    shape, learn, engine = made.shape, made.config.learn, made.engine
    if any(size % learn.tp for size in shape.divided(whole_experts=learn.ep > 1).values()):
        return f"learn.tp={learn.tp} does not divide the model's heads, kv_heads or ffn"
    if shape.layers % learn.pp:
        return f"learn.pp={learn.pp} does not divide the model's {shape.layers} layers"
    if uneven(shape, engine.tp):
        return f"engine.tp={engine.tp} does not divide the model's heads or ffn"
    if made.learner_memory.total > FULL * made.gpu.memory:
        return f"a learner rank needs more than {FULL:.0%} of its GPU's {made.gpu.memory / GIB:.1f} GiB"
    if made.problems:
        return f"an engine of {count(engine.tp, 'GPU')} does not hold one context of engine.max_context"
    flow, rollout = made.config.flow, made.config.rollout
    if flow.batch_leaves // rollout.leaves // learn.updates < learn.dp:
        return "learn.dp is more than there are trees in an update (flow.batch_leaves, learn.updates)"
    return ""


def table(config: Config, gpus: int, found: Found) -> str:
    """What ``espalier plan --search`` prints before the plan of the fastest."""
    lines = [f"{found.fitting:,} of {found.tried:,} layouts fit on {gpus} GPUs"]
    if not found.best:
        lines[0] += (
            ": give more of them or larger ones (--gpu), or lower learn.micro_tokens and engine.max_context; "
            "learn.offload=true, which is not searched, may fit: plan it without --search"
        )
    else:
        lines[0] += (
            f"; the fastest first (steps within {ALIKE:.0%} of each other count as equal: then those of "
            "fewer parts, and with more memory left)"
        )
        rows = [("learner", "recompute", "engines", "a step", "idle: engines, learner", "memory of a rank")]
        rows += [_row(layout, made) for layout, made in found.best]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines += [
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += ["the first: " + " ".join(found.best[0][0].settings(config))]
    if found.refused:
        lines += ["refused:", *(f"  {number:>6,}  {why}" for why, number in found.refused.items())]
    return "\n".join(lines)


def _row(layout: Candidate, made: GpuPlan) -> tuple[str, ...]:
    forecast, memory = made.forecast, made.learner_memory.total
    return (
        f"tp {layout.tp} · pp {layout.pp} · cp {layout.cp} · dp {layout.dp}"
        + (f" · ep {layout.ep}" if layout.ep > 1 else ""),
        layout.recompute,
        f"{layout.engines} of {count(layout.engine_tp, 'GPU')}",
        duration(forecast.step_s),
        f"{forecast.engines_idle:.0%}, {forecast.learner_idle:.0%}",
        f"{memory / GIB:.1f} GiB",
    )
