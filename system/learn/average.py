"""A moving average of the weights as the proximal policy: PPO-EWMA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

import torch

ModelT = TypeVar("ModelT", bound=torch.nn.Module)


class MovingAverage(Generic[ModelT]):
    """θ̄ = Σ β^(t-k)·θ_k / Σ β^(t-k) over the weights θ_k after each optimizer step, those at the start first
    (Hilton et al., arXiv 2110.00641 §3.2; the total weight as in openai/ppo-ewma).

    Kept in the weights' own precision.  ``weight``: Σ β^(t-k).
    """

    def __init__(self, model: ModelT, decay: float) -> None:
        """``model``: holds the average, at first of what it is; ``decay``: β."""
        self.model, self.decay, self.weight = model, decay, 1.0
        model.requires_grad_(False)

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """``model`` has been stepped."""
        weight = self.decay * self.weight + 1.0
        for mean, new in zip(self.model.parameters(), model.parameters(), strict=True):
            mean.mul_(self.decay * self.weight / weight).add_(new, alpha=1.0 / weight)
        self.weight = weight

    def reset(self, model: torch.nn.Module) -> None:
        """Begin again at the weights of ``model``."""
        self.model.load_state_dict(model.state_dict())
        self.weight = 1.0


def decay_for(lag: int) -> float:
    """β = S/(S + 2), so that the average is about as old as tokens that may lag S versions (revised PPO-EWMA,
    arXiv 2605.12070).
    """
    return lag / (lag + 2)


def active_share(stats: Mapping[str, float]) -> float:
    """Share of the tokens whose gradient passes: neither clipped nor rejected."""
    return 1.0 - sum(stats.get(name, 0.0) for name in ("clip_high", "clip_low", "tis_masked", "tis_rejected"))
