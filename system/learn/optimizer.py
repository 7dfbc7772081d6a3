"""AdamW over the gradients that Megatron's DDP holds: what the trainer and checkpoints ask of it, and the one
whose state lies on the device (:mod:`system.learn.offload` has the other).
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from system.config import LearnConfig
from system.learn import cpu

MOMENTS = ("exp_avg", "exp_avg_sq")

log = logging.getLogger(__name__)


class StateSlice(NamedTuple):
    """Elements of a parameter, flattened, from ``start`` on: its float32 values, or one of its moments."""

    kind: str  # "parameter", or one of MOMENTS
    values: torch.Tensor
    start: int


class Adam(ABC):
    """AdamW whose decay spares norms and biases; its step counts from the start or the last reset.

    All methods are collective over all learner ranks.
    """

    steps = 0

    def __init__(self, learn: LearnConfig) -> None:
        self.learn = learn

    def step(self, lr: float) -> tuple[float, bool]:
        """Clip the reduced gradients and step; returns (their norm, whether the step was taken).

        Gradients that are not finite are not applied.
        """
        limit = self.learn.grad_clip if self.learn.grad_clip > 0 else math.inf
        norm = self._clip(limit)
        if finite := math.isfinite(norm):
            self._apply(lr)
            self.steps += 1
        else:
            log.warning("optimizer step %d skipped: the gradient norm is %s", self.steps, norm)
        return norm, finite

    @abstractmethod
    def zero_grad(self) -> None:
        """Gradients begin anew."""

    @abstractmethod
    def _clip(self, limit: float) -> float:
        """Scale the gradients so that their norm is at most ``limit``; returns what it was."""

    @abstractmethod
    def _apply(self, lr: float) -> None:
        """Step."""

    @abstractmethod
    def reset(self) -> None:
        """State as before the first step: zero moments."""

    def resume(self, steps: int) -> None:
        """The slices have been filled from a checkpoint that was made after ``steps`` steps."""
        self.steps = steps

    @abstractmethod
    def slices(self, parameter: torch.nn.Parameter, mine: bool) -> Iterator[StateSlice]:
        """What this rank holds of a parameter, as views.

        State that is split over the ranks has a share (perhaps none) on each; other state is whole on every
        rank, and given where the parameter is ``mine``.
        """


class DeviceAdam(Adam):
    """Megatron's optimizer, whose state lies beside the model, split over the data-parallel ranks with
    ``learn.distributed_optimizer``.
    """

    def __init__(self, ddp: DistributedDataParallel, model: TransformerConfig, learn: LearnConfig) -> None:
        super().__init__(learn)
        self._ddp = ddp
        with cpu.scope():
            self._optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=learn.lr,
                    weight_decay=learn.weight_decay,
                    adam_beta1=learn.beta1,
                    adam_beta2=learn.beta2,
                    adam_eps=learn.eps,
                    clip_grad=learn.grad_clip,
                    bf16=model.bf16,
                    params_dtype=model.params_dtype,
                    use_distributed_optimizer=learn.distributed_optimizer,
                ),
                [ddp],
                use_gloo_process_groups=False,
            )
        self._inner = self._optimizer.chained_optimizers  # pyright: ignore[reportAttributeAccessIssue]
        for group in self._optimizer.param_groups:
            # Torch's default makes temporary copies: 4 bytes per parameter more at the step's peak.
            group |= {"fused": True, "foreach": False}
        self.reset()

    def zero_grad(self) -> None:
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()

    def _clip(self, limit: float) -> float:
        with cpu.scope():
            self._optimizer.prepare_grads()
            # Over all of them: the experts of a mixture that are not everywhere have an optimizer of their
            # own, with which Megatron's `clip_grad_norm` fails.
            norm = float(self._optimizer.get_grad_norm())
            for inner in self._inner:
                if parameters := inner.get_parameters():
                    clip_grad_by_total_norm_fp32(parameters, limit, norm)
        return norm

    def _apply(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
            # Megatron's own scheduler would do this; without it norms and biases are decayed too.
            group["weight_decay"] = self.learn.weight_decay * group["wd_mult"]
        with cpu.scope():
            self._optimizer.step_with_ready_grads()

    def reset(self) -> None:
        # Torch makes it lazily, but a checkpoint taken before the first step must have the same entries as
        # any other.
        self.steps = 0
        for inner in self._inner:
            for group in inner.optimizer.param_groups:
                for parameter in group["params"]:
                    moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
                    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    inner.optimizer.state[parameter] = {"step": step, **moments}

    def resume(self, steps: int) -> None:
        super().resume(steps)
        for inner in self._inner:
            for state in inner.optimizer.state.values():
                state["step"].fill_(float(steps))

    def slices(self, parameter: torch.nn.Parameter, mine: bool) -> Iterator[StateSlice]:
        for inner in self._inner:
            start = 0
            if isinstance(inner, DistributedOptimizer):
                if parameter not in inner.model_param_group_index_map:
                    continue
                group, index = inner.model_param_group_index_map[parameter]
                main = inner.optimizer.param_groups[group]["params"][index]
                start = inner._get_model_param_range_map(parameter)["param"].start  # pyright: ignore[reportPrivateUsage]
            elif mine:
                main = getattr(parameter, "main_param", parameter)  # float32 where the model is bfloat16
                if main not in inner.optimizer.state:
                    continue  # another one steps it
            else:
                continue
            yield StateSlice("parameter", main.detach(), start)
            for name in MOMENTS:
                yield StateSlice(name, inner.optimizer.state[main][name], start)
