"""A moving average of the weights as the proximal policy: PPO-EWMA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

import torch

ModelT = TypeVar("ModelT", bound=torch.nn.Module)


class MovingAverage(Generic[ModelT]):
    """θ̄ = Σ β^(t-k)·θ_k / Σ β^(t-k) over the weights θ_k after each optimizer step, those at the start first
    (Hilton et al., arXiv 2110.00641 §3.2; the total weight as in openai/ppo-ewma).

    Kept in float32, whatever the model's dtype: one update moves it by 1 / weight of what the weights moved,
    which bfloat16 would round away.  ``weight``: Σ β^(t-k).  ``mean``: θ̄ by the parameters' names.
    """

    def __init__(self, model: ModelT, decay: float) -> None:
        """``model``: computes with the average, at first of what it is; ``decay``: β."""
        self.model, self.decay, self.weight = model, decay, 1.0
        model.requires_grad_(False)
        # Of a float32 model its very parameters.
        self.mean = {name: one.detach().float() for name, one in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """``model`` has been stepped."""
        self.weight = self.decay * self.weight + 1.0
        for mean, new in zip(self.mean.values(), model.parameters(), strict=True):
            mean.lerp_(new.float(), 1.0 / self.weight)
        self._show()

    @torch.no_grad()
    def reset(self, model: torch.nn.Module) -> None:
        """Begin again at the weights of ``model``."""
        self.model.load_state_dict(model.state_dict())
        for mean, new in zip(self.mean.values(), model.parameters(), strict=True):
            mean.copy_(new)
        self.weight = 1.0

    @torch.no_grad()
    def restored(self, weight: float) -> None:
        """``mean`` has been read from a checkpoint, whose total weight was ``weight``."""
        self.weight = weight
        self._show()

    def _show(self) -> None:
        """Have the model compute with the average."""
        for name, shown in self.model.named_parameters():
            if shown.dtype != torch.float32:
                shown.copy_(self.mean[name])


def decay_for(lag: int) -> float:
    """β = S/(S + 2), so that the average is about as old as tokens that may lag S versions (revised PPO-EWMA,
    arXiv 2605.12070).
    """
    return lag / (lag + 2)


def active_share(stats: Mapping[str, float]) -> float:
    """Share of the tokens whose gradient passes: neither clipped nor rejected."""
    return 1.0 - sum(stats.get(name, 0.0) for name in ("clip_high", "clip_low", "tis_masked", "tis_rejected"))
