"""Speed of engines and learners from first principles: a roofline with stated efficiencies.

A decode step reads all weights and the KV cache of every running sequence from HBM, or is bound by its matrix
products, whichever takes longer; on top comes a fixed cost per step and per sequence.  A training step costs
6 floating-point operations per parameter and token (Kaplan et al., 2020, 2.1), attention's, those that are
recomputed, and the exchange between tensor-parallel and between context-parallel ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from system.config import LearnConfig
from system.models.shape import ModelShape
from system.plan.hardware import NODE, Gpu
from system.plan.memory import (
    WIDTH,
    EngineLayout,
    adapter_parameters,
    averages,
    kv_capacity,
    trained_parameters,
)


@dataclass(frozen=True, slots=True)
class EngineRoofline:
    """One engine (``layout.tp`` GPUs).  Times in seconds, context in tokens."""

    shape: ModelShape
    layout: EngineLayout
    gpu: Gpu

    @property
    def kv_tokens(self) -> int:
        """KV cache, in tokens."""
        return kv_capacity(self.shape, self.layout, self.gpu.memory)

    def step_s(self, running: float, context: float) -> float:
        """One decode step: a token for each of ``running`` sequences, holding ``context`` tokens in all."""
        gpu, tp = self.gpu, self.layout.tp
        width, layout, table = WIDTH[self.layout.dtype], self.layout, self.shape.embedding
        matrices = 1 if layout.float8 else width
        cache = self.shape.kv_bytes_per_token(layout.cache_width or width)
        read = matrices * (self._read(running) - table) + width * table + cache * context
        memory = read / (tp * gpu.hbm * gpu.hbm_share)
        products = 2 * self.shape.active * running / (tp * gpu.flops * gpu.decode_mfu)
        talk = 2 * self.shape.layers * gpu.allreduce_s if tp > 1 else 0.0
        return max(memory, products) + talk + gpu.step_overhead_s + gpu.sequence_overhead_s * running

    def _read(self, running: float) -> float:
        """Parameters that a step reads: of the experts those that any of its tokens goes through, where each
        goes where it will.
        """
        shape, experts = self.shape, self.shape.experts
        if experts is None:
            return shape.active
        touched = experts.count * (1 - (1 - experts.chosen / experts.count) ** max(running, 1.0))
        one = 3 * shape.hidden * experts.ffn
        return shape.active + experts.layers * one * (touched - experts.chosen)

    def prefill_s(self, tokens: float) -> float:
        """Computing ``tokens`` prompt tokens that no cache holds."""
        return 2 * self.shape.active * tokens / (self.layout.tp * self.gpu.flops * self.gpu.prefill_mfu)


@dataclass(frozen=True, slots=True)
class LearnerRoofline:
    """All ranks of the learner together."""

    shape: ModelShape
    learn: LearnConfig
    gpu: Gpu
    context: float = 0.0  # tokens that a token attends to, on average; 0: attention is not counted
    node: int = NODE  # GPUs of a machine

    def train_s(self, tokens: float) -> float:
        """Forward and backward over ``tokens`` packed tokens, plus the optimizer's pass over its state."""
        learn = self.learn
        # A pipeline idles (pp - 1) / micro-batches of an update (Narayanan et al., 2021, section 2.2), and
        # waits for its last stage, which has the head.
        micros = max(1.0, tokens / (learn.micro_tokens * learn.dp * learn.updates))
        bubble = (1 + (learn.pp - 1) / micros) * self._slowest
        # Less than a micro-batch per replica leaves replicas without work.
        replicas = min(learn.dp, max(1.0, tokens / learn.micro_tokens))
        return tokens / replicas * self.token_s * bubble + learn.updates * self._optimizer_s()

    @property
    def token_s(self) -> float:
        """Seconds that one replica of tp · pp · cp ranks takes for a token: kernels, then the exchange
        between its tensor-parallel and its context-parallel ranks, which nothing hides.
        """
        learn, gpu = self.learn, self.gpu
        ranks = learn.tp * learn.pp * learn.cp
        forward = self.flops / 3
        flops = self.flops + self._recomputed + self._scored * forward
        if learn.lora.on:  # no gradients of the model's own weights; the adapters' products are thin
            flops -= 2 * self.shape.active
        near, far = gpu.nvlink * gpu.nvlink_share, gpu.network * gpu.network_share
        exchange = self._exchanged / near / (learn.pp * learn.cp)
        one_node = self.node % (learn.tp * learn.cp) == 0  # ranks are numbered so (parallel.Layout)
        exchange += self._gathered / (near if one_node else far) / learn.pp
        exchange += self._dispatched / (near if self.node % learn.ep == 0 else far) / ranks
        return flops / (ranks * gpu.flops * gpu.train_mfu) + exchange

    @property
    def _scored(self) -> float:
        """Forward passes more, of a token on average: of the reference model or an average that teaches,
        for the proximal policy or a correction, for an objective that looks ahead (``Trainer.train``).
        """
        learn = self.learn
        corrects, objective = learn.correction.name != "none", learn.objective.name
        known = learn.proximal == "closed" and (corrects or objective == "decoupled")  # from the engines
        later = (learn.updates - 1) / learn.updates  # of the tokens, those of all updates but the first
        passes = float(learn.kl_coef > 0) + (learn.teacher == "average")
        if corrects or objective == "decoupled":
            passes += 0.0 if known else 1.0 if corrects or averages(learn) else later
        if objective == "m2po":
            passes += later if corrects and not known else 1.0
        return passes

    @property
    def flops(self) -> float:
        """Operations of a token's forward and backward pass as the model defines them."""
        return 6 * self.shape.active + 3 * self._attention

    @property
    def mfu(self) -> float:
        """Share of the GPUs' peak that those are, while rows are full and no stage of a pipeline waits."""
        return self.flops / self.token_s / (self.learn.tp * self.learn.pp * self.learn.cp * self.gpu.flops)

    @property
    def _slowest(self) -> float:
        """Work of the last pipeline stage, in those of the average one."""
        shape, pp = self.shape, self.learn.pp
        return (shape.active + (pp - 1) * shape.embedding) / shape.active

    @property
    def _attention(self) -> float:
        """Operations of attention for one token, forward: scores and weighted sum."""
        return 4 * self.shape.layers * self.shape.heads * self.shape.head_dim * self.context

    @property
    def _recomputed(self) -> float:
        """Operations that the backward pass repeats."""
        shape = self.shape
        return {
            "none": 0.0,
            "selective": 2.0 * sum(shape.mlp(at) for at in range(shape.layers)),
            "full": 2.0 * (shape.active - shape.embedding) + self._attention,
        }[self.learn.recompute]

    @property
    def _exchanged(self) -> float:
        """Bytes per token over a rank's link, of all layers: Korthikanti et al. (2022), section 4.2.

        Experts exchange otherwise (:attr:`_dispatched`), which leaves the half that is attention's.  A layer
        has two all-reduces forward and two backward (with sequence parallelism each an all-gather and
        a reduce-scatter, which moves the same, and inputs gathered once more for the weights' gradients).
        """
        learn = self.learn
        halves = 8 + 2 * learn.sequence_parallel + {"none": 0, "selective": 2, "full": 4}[learn.recompute]
        halves += 4 * self._scored
        width, sparse = WIDTH["bfloat16"], self.shape.experts.layers if self.shape.experts else 0
        layers = self.shape.layers - sparse / 2
        return halves * width * self.shape.hidden * (learn.tp - 1) / learn.tp * layers

    @property
    def _dispatched(self) -> float:
        """Bytes per token of a row that leave the rank that has it, for its experts and back, of all layers:
        to the ranks that hold them (``learn.ep``), or each to all ranks that they are split over.
        """
        learn, experts = self.learn, self.shape.experts
        if experts is None:
            return 0.0
        others = (learn.ep - 1) / learn.ep if learn.ep > 1 else learn.tp - 1
        times = 4 + 2 * (learn.recompute != "none") + 2 * self._scored
        return times * experts.chosen * WIDTH["bfloat16"] * self.shape.hidden * others * experts.layers

    @property
    def _gathered(self) -> float:
        """Bytes per token of a row over a rank's link, of all layers: its key and value to the other
        context-parallel ranks, forward and where layers are recomputed, and their gradient back.
        """
        learn, shape = self.learn, self.shape
        times = 2 + (learn.recompute == "full") + self._scored
        each = WIDTH["bfloat16"] * 2 * shape.kv_heads * shape.head_dim / learn.tp * shape.layers
        return times * each * (learn.cp - 1) / learn.cp

    def _optimizer_s(self) -> float:
        """Gradient all-reduce over DP and CP (ring, fp32), one pass over weights, gradients and moments."""
        learn, gpu, shape = self.learn, self.gpu, self.shape
        experts = sum(shape.of_experts(at) for at in range(shape.layers))
        stepped = [
            ((shape.parameters - experts) / (learn.tp * learn.pp), learn.copies),
            (experts / (learn.ep * learn.expert_tp * learn.pp), learn.expert_copies),
        ]
        if learn.lora.on:
            stepped = [(trained_parameters(shape, learn, 0), learn.copies)]
        seconds = 0.0
        for held, copies in stepped:
            seconds += 2 * (copies - 1) / copies * 4 * held / (gpu.network * gpu.network_share)
            if learn.offload:
                seconds += 34 * held / copies / gpu.host
            else:
                shards = copies if learn.distributed_optimizer else 1
                seconds += 26 * held / shards / (gpu.hbm * gpu.hbm_share)
        return seconds


@dataclass(frozen=True, slots=True)
class PublishRoofline:
    """New weights from the learner into all engines, by one broadcast (``engine.weights=distributed``).

    First rank 0 gathers all shards and keeps them in pinned memory, while engines generate.  Then engines
    stand still: bucket after bucket leaves rank 0 once and is handed on among the engines' ranks in a ring,
    which takes one transfer's time however many they are; every rank reads each bucket and writes its own
    share, and proves by its digest what it holds, all servers at the same time.

    Adapters that travel by themselves are loaded beside those that running requests go on with: nothing
    stands still.
    """

    shape: ModelShape
    learn: LearnConfig
    layout: EngineLayout
    gpu: Gpu
    one_node: bool = False  # learner and engines
    adapters: bool = False  # travel by themselves

    @property
    def size(self) -> float:
        """Bytes that travel: of all weights, as engines hold them, or of the adapters."""
        sent = adapter_parameters(self.shape, self.learn) if self.adapters else self.shape.parameters
        return sent * WIDTH[self.layout.dtype]

    @property
    def stage_s(self) -> float:
        """Until all weights lie ready at rank 0, or engines have the adapters; they generate meanwhile."""
        gpu, ranks = self.gpu, self.learn.tp * self.learn.pp
        gathered = self.size * (1 - 1 / ranks) / (gpu.nvlink * gpu.nvlink_share)
        return gathered + self.size / gpu.pcie + (self._taken_s if self.adapters else 0.0)

    @property
    def pause_s(self) -> float:
        """That every engine stands still, the slowest like all others."""
        return 0.0 if self.adapters else self._taken_s

    @property
    def _taken_s(self) -> float:
        """From rank 0 into all engines."""
        gpu = self.gpu
        near, far = gpu.nvlink * gpu.nvlink_share, gpu.network * gpu.network_share
        sent = self.size / gpu.pcie + self.size / (near if self.one_node else far)
        loaded = (1 + 2 / self.layout.tp) * self.size / (gpu.hbm * gpu.hbm_share)
        buckets = math.ceil(self.size / (self.learn.bucket_mb << 20))
        return sent + loaded + buckets * gpu.bucket_s + gpu.swap_s
