"""How far a trained policy is from the one that sampled, by log-ratios d = log ρ, ρ = π_prox/μ.

Schulman's estimators of KL(μ‖π_prox) at samples of μ, as verl names them: k1 = -d, k2 = d²/2,
k3 = e^d - 1 - d.
"""

from __future__ import annotations

import math

import torch

from system.plugins import PluginError

# exp() of a log-ratio beyond this says nothing more and would overflow a product of float32 numbers.
MAX_LOG_RATIO = 20.0
MEASURES = ("k1", "k2", "k3")


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Schulman's low-variance KL estimator: KL(p‖q) ≈ e^d - 1 - d with d = log q - log p at samples of p."""
    d = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(d) - d


def exp_ratio(logprob: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """[M] probability ratio of two log-probabilities, within what float32 holds."""
    return (logprob - other).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def divergence(measure: str, log_ratio: torch.Tensor) -> torch.Tensor:
    """k1, k2 or k3 of each log-ratio, which is held within ±``MAX_LOG_RATIO``."""
    d = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return -d if measure == "k1" else d * d / 2 if measure == "k2" else k3(d)


class Band:
    """The divergences that are accepted.

    k2 and k3 up to ``high``.  k1 within log ``low`` and log ``high``, which are therefore bounds of 1/ρ, as
    in verl: 0.6 and 1.6 accept 0.625 <= ρ <= 1.67.
    """

    def __init__(self, measure: str, low: float, high: float, prefix: str = "") -> None:
        """Raises :class:`PluginError`, naming options that begin with ``prefix``."""
        given = f"{prefix}low={low:g}, {prefix}high={high:g}"
        if measure == "k1":
            if not 0 <= low < high:
                raise PluginError(f"{given}: bounds of 1/ρ, 0 <= {prefix}low < {prefix}high")
            self.low, self.high = math.log(low) if low else -math.inf, math.log(high)
        else:
            if low or not high > 0:
                raise PluginError(f"{given}: {measure} has one bound, {prefix}high above 0")
            self.low, self.high = -math.inf, high
        self.measure = measure

    def holds(self, value: torch.Tensor) -> torch.Tensor:
        """Whether each divergence, or sum or mean of some, is accepted."""
        return (value >= self.low) & (value <= self.high)
