"""Training objectives over the tokens of a packed row, by name, and the statistics they leave behind.

All leaves below a token share its ratio r, so clipping is exact with two weights per token,
S⁺ = Σ w·max(A, 0) and S⁻ = Σ w·min(A, 0) over those leaves:

    Σ_leaf w·min(r·A, clip(r, 1-ε_lo, 1+ε_hi)·A)  =  S⁺·min(r, 1+ε_hi) + S⁻·max(r, 1-ε_lo)

and with dual clipping (Ye et al., arXiv 1912.09729), which bounds the loss of a bad action that became
likely, the last factor is min(max(r, 1-ε_lo), c).  The weights are normalised over the optimizer step, so
losses only add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from system.config import LearnConfig

# exp() of a log-ratio beyond this says nothing more and would overflow a product of float32 numbers.
MAX_LOG_RATIO = 20.0

# Statistics that are totals of an optimizer step; the other sums are reported as means.
TOTALS = ("loss", "tokens", "tokens_computed")
# Statistics that are means over a part of the tokens, whose share of all is the other statistic.
PARTIAL = {"engine_kl": "fresh"}


@dataclass(frozen=True)
class LossTokens:
    """The M tokens of one packed row that are trained on; every tensor is ``[M]`` float32, log-probabilities
    in nats.
    """

    logprob: torch.Tensor  # under the current policy, with gradient
    entropy: torch.Tensor  # of the current policy at this token, with gradient
    behaviour: torch.Tensor  # log-probability the engine sampled with (μ)
    s_plus: torch.Tensor
    s_minus: torch.Tensor
    mult: torch.Tensor  # Σ w over the scored leaves below
    staleness: torch.Tensor  # versions between the sampling policy and the trained one
    proximal: torch.Tensor | None = (
        None  # under the policy at the start of the batch; None: that is the current one
    )
    reference: torch.Tensor | None = None  # under the frozen reference model; None: no KL term


@dataclass
class Statistics:
    """Sums and maxima that add up over micro-batches and data-parallel ranks."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, other: Statistics) -> None:
        for name, value in other.sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        for name, value in other.maxima.items():
            self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value

    def reduce(
        self, expected: Statistics, device: torch.device, groups: Sequence[dist.ProcessGroup]
    ) -> dict[str, float]:
        """Totals over the ranks of all ``groups``, one after the other; collective.

        ``expected`` names what there is, because a rank without micro-batches, or one that is not on the last
        pipeline stage, has no statistics of its own.  Sums become means weighted by ``mult``, except the
        ``TOTALS``.
        """
        zero = torch.zeros((), device=device)
        names, tops = list(expected.sums), list(expected.maxima)
        total = torch.stack([self.sums.get(n, zero).double() for n in names])
        top = torch.stack([self.maxima.get(n, zero).double() for n in tops]) if tops else None
        for group in groups:
            dist.all_reduce(total, group=group)
            if top is not None:
                dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        values = dict(zip(names, total.tolist(), strict=True))
        weight = values.pop("weight")
        out = {
            name: value if name in TOTALS else value / weight if weight > 0 else 0.0
            for name, value in values.items()
        }
        for name, part in PARTIAL.items():
            if name in out:
                out[name] = out[name] / out[part] if out[part] > 0 else 0.0
        if top is not None:
            out |= dict(zip(tops, top.tolist(), strict=True))
        return out


Objective = Callable[[LossTokens, LearnConfig], tuple[torch.Tensor, Statistics]]


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Schulman's low-variance KL estimator: KL(p‖q) ≈ e^d - 1 - d with d = log q - log p at samples of p."""
    d = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(d) - d


def clipped_surrogate(
    ratio: torch.Tensor, s_plus: torch.Tensor, s_minus: torch.Tensor, config: LearnConfig
) -> torch.Tensor:
    """The per-token gain S⁺·min(r, 1+ε_hi) + S⁻·min(max(r, 1-ε_lo), c); ``dual_clip`` c = 0 leaves the last
    bound out.
    """
    dual = config.dual_clip if config.dual_clip > 0 else None
    return s_plus * ratio.clamp(max=1 + config.clip_high) + s_minus * ratio.clamp(1 - config.clip_low, dual)


def ppo(t: LossTokens, config: LearnConfig) -> tuple[torch.Tensor, Statistics]:
    """PPO-clip (Schulman et al., arXiv 1707.06347) with dual clip, on r = π_θ/μ."""
    ratio = (t.logprob - t.behaviour).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    gain = clipped_surrogate(ratio, t.s_plus, t.s_minus, config)
    return _with_regularisers(-gain.sum(), t, config, _ratio_statistics(ratio, t, config))


def decoupled(t: LossTokens, config: LearnConfig) -> tuple[torch.Tensor, Statistics]:
    """Decoupled PPO (Hilton et al., arXiv 2110.00641): clip r = π_θ/π_prox, weigh by truncated π_prox/μ.

    π_prox is the policy at the start of the batch; with one update per batch that is the current policy's own
    detached log-probability.  The importance weight min(π_prox/μ, ``tis_cap``) carries no gradient.
    """
    proximal = t.logprob.detach() if t.proximal is None else t.proximal
    ratio = (t.logprob - proximal).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    full = (proximal - t.behaviour).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    weight = full.clamp(max=config.tis_cap)
    gain = weight * clipped_surrogate(ratio, t.s_plus, t.s_minus, config)
    statistics = _ratio_statistics(ratio, t, config)
    statistics.sums["tis_mean"] = (t.mult * weight).sum()
    statistics.sums["tis_capped"] = (t.mult * (full > config.tis_cap)).sum()
    return _with_regularisers(-gain.sum(), t, config, statistics)


def nll(t: LossTokens, config: LearnConfig) -> tuple[torch.Tensor, Statistics]:
    """Supervised negative log-likelihood Σ -mult·log π_θ."""
    loss = -(t.mult * t.logprob).sum()
    return loss, Statistics(_base_sums(t) | {"loss": loss.detach()})


# `grpo-flat` is PPO-clip on root-to-leaf paths: the trainer flattens the trees, the formula is the same.
OBJECTIVES: Mapping[str, Objective] = {"ppo": ppo, "decoupled": decoupled, "grpo-flat": ppo, "nll": nll}


def _base_sums(t: LossTokens) -> dict[str, torch.Tensor]:
    return {
        "weight": t.mult.sum(),
        "tokens": t.mult.new_tensor(t.mult.numel()),
        "entropy": (t.mult * t.entropy.detach()).sum(),
    }


def _ratio_statistics(ratio: torch.Tensor, t: LossTokens, config: LearnConfig) -> Statistics:
    r = ratio.detach()
    high = (r > 1 + config.clip_high) & (t.s_plus > 0)
    low = (r < 1 - config.clip_low) & (t.s_minus < 0)
    # Tokens that were sampled from the very weights that are trained: what differs there is numerical.
    fresh = t.mult * (t.staleness == 0)
    difference = (t.logprob.detach() if t.proximal is None else t.proximal) - t.behaviour
    sums = _base_sums(t) | {
        "ratio_mean": (t.mult * r).sum(),
        "clip_high": (t.mult * high).sum(),
        "clip_low": (t.mult * low).sum(),
        # Sampled by μ, so this estimates KL(μ‖π_θ): staleness plus the engines' numerical differences.
        "mismatch_kl": (t.mult * k3(t.logprob.detach() - t.behaviour)).sum(),
        "engine_kl": (fresh * k3(difference)).sum(),
        "fresh": fresh.sum(),
        "staleness_mean": (t.mult * t.staleness).sum(),
    }
    maxima = {
        "ratio_max": r.amax(),
        "staleness_max": t.staleness.amax(),
        "engine_logprob_diff_max": ((fresh > 0) * difference.abs()).amax(),
    }
    return Statistics(sums, maxima)


def _with_regularisers(
    loss: torch.Tensor, t: LossTokens, config: LearnConfig, statistics: Statistics
) -> tuple[torch.Tensor, Statistics]:
    if config.entropy_coef:
        loss = loss - config.entropy_coef * (t.mult * t.entropy).sum()
    if t.reference is not None:
        # GRPO's penalty (arXiv 2402.03300, eq. 4): k3 with the gradient through π_θ.
        kl = (t.mult * k3(t.reference - t.logprob)).sum()
        loss = loss + config.kl_coef * kl
        statistics.sums["reference_kl"] = kl.detach()
    statistics.sums["loss"] = loss.detach()
    return loss, statistics
