"""Speed of engines and learners from first principles: a roofline with stated efficiencies.

A decode step reads all weights and the KV cache of every running sequence from HBM, or is bound by its matrix
products, whichever takes longer; on top comes a fixed cost per step and per sequence.  A training step costs
6 floating-point operations per parameter and token (8 with full recomputation), and twice as many for each
number of a key that it attends to; Kaplan et al. (2020), 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass

from system.config import LearnConfig
from system.models.shape import ModelShape
from system.plan.hardware import Gpu
from system.plan.memory import WIDTH, EngineLayout, kv_capacity


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
        width = WIDTH[self.layout.dtype]
        read = width * self.shape.active + self.shape.kv_bytes_per_token(width) * context
        memory = read / (tp * gpu.hbm * gpu.hbm_share)
        products = 2 * self.shape.active * running / (tp * gpu.flops * gpu.decode_mfu)
        talk = 2 * self.shape.layers * gpu.allreduce_s if tp > 1 else 0.0
        return max(memory, products) + talk + gpu.step_overhead_s + gpu.sequence_overhead_s * running

    def prefill_s(self, tokens: float) -> float:
        """Computing ``tokens`` prompt tokens that no cache holds."""
        return 2 * self.shape.active * tokens / (self.layout.tp * self.gpu.flops * self.gpu.prefill_mfu)


@dataclass(frozen=True, slots=True)
class LearnerRoofline:
    """All ranks of the learner together."""

    shape: ModelShape
    learn: LearnConfig
    gpu: Gpu

    def train_s(self, tokens: float, context: float = 0.0) -> float:
        """Forward and backward over ``tokens`` packed tokens, plus the optimizer's pass over its state.

        ``context``: tokens that one of them attends to, on average.
        """
        learn, gpu, shape = self.learn, self.gpu, self.shape
        passes = 8 if learn.recompute == "full" else 6
        each = shape.active + 2 * shape.layers * shape.heads * shape.head_dim * context
        # A pipeline idles (pp - 1) / micro-batches of the time (Narayanan et al., 2021, section 2.2).
        micros = max(1.0, tokens / (learn.micro_tokens * learn.dp))
        bubble = 1 + (learn.pp - 1) / micros
        # Less than a micro-batch per replica leaves replicas without work.
        replicas = min(learn.dp, max(1.0, tokens / learn.micro_tokens))
        share = tokens / replicas
        ranks = learn.tp * learn.pp * learn.cp
        compute = passes * each * share / (ranks * gpu.flops * gpu.train_mfu)
        return (compute + self._gather_s(share)) * bubble + self._optimizer_s()

    def _gather_s(self, tokens: float) -> float:
        """Context parallelism: keys and values of ``tokens`` to the other ranks, and their gradients back."""
        learn, shape, gpu = self.learn, self.shape, self.gpu
        times = 3 if learn.recompute == "full" else 2
        each = WIDTH["bfloat16"] * 2 * shape.kv_heads * shape.head_dim * shape.layers / (learn.tp * learn.pp)
        others = (learn.cp - 1) / learn.cp
        return times * each * others * tokens / (gpu.network * gpu.network_share)

    def _optimizer_s(self) -> float:
        """Gradient all-reduce over DP and CP (ring, fp32), one pass over weights, gradients and moments."""
        learn, gpu = self.learn, self.gpu
        held = self.shape.parameters / (learn.tp * learn.pp)
        copies = learn.cp * learn.dp
        ring = 2 * (copies - 1) / copies * 4 * held / (gpu.network * gpu.network_share)
        shards = copies if learn.distributed_optimizer else 1
        return ring + 26 * held / shards / (gpu.hbm * gpu.hbm_share)


def publish_s(shape: ModelShape, gpu: Gpu) -> float:
    """Streaming all weights from rank 0 into the engines, in buckets down a pipeline of receivers."""
    return shape.parameters * WIDTH["bfloat16"] / (gpu.network * gpu.network_share)
