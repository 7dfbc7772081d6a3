"""Objectives other than PPO's clip: how much of a token's gradient passes at which probability ratio.

Each is a sum over tokens of S⁺·g⁺ + S⁻·g⁻, where the two gains depend on the token and on the sign of the
advantage only.  All leaves below a token share both, so the sums over leaves S⁺ and S⁻
(:mod:`system.tree.plan`) give exactly the loss of the flattened paths; GSPO trains these themselves.
r = π_θ/μ throughout, with the policy μ that sampled; "detached" factors carry no gradient, and the value of
such a loss (weight · log π) cannot be compared with PPO's.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch

from system.learn.credit.gain import clip_scale
from system.learn.divergence import MAX_LOG_RATIO, exp_ratio
from system.learn.objective import LossTokens, Objective, Ppo, Statistics
from system.plugins import PluginError
from system.tree.record import Float64
from system.tree.stats import TreeStats

_MOST_LOG_RATIO = 10.0  # of a turn, as in the authors' code


class Gate(Objective):
    """A loss -Σ S⁺·g⁺ + S⁻·g⁻."""

    @abstractmethod
    def gains(self, t: LossTokens, ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[M] g⁺ and g⁻ of each token at its ``ratio`` r [M]."""

    def loss(self, t: LossTokens) -> tuple[torch.Tensor, Statistics]:
        ratio = exp_ratio(t.logprob, t.behaviour)
        up, down = self.gains(t, ratio)
        r = ratio.detach()
        statistics = Statistics({"ratio_mean": (t.mult * r).sum()}, {"ratio_max": r.amax()})
        return -(t.s_plus * up + t.s_minus * down).sum(), statistics


class Cispo(Gate):
    """g = detached clip(r, 1 - ε_low, 1 + ε_high) · log π_θ  (MiniMax-M1, arXiv 2506.13585 §3.1).

    Every token keeps a gradient; only its weight is bounded.  The defaults are verl's: no lower bound.
    """

    def __init__(self, eps_low: float = 10.0, eps_high: float = 0.2) -> None:
        self.low, self.high = 1 - eps_low, 1 + eps_high

    def gains(self, t: LossTokens, ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gain = ratio.detach().clamp(self.low, self.high) * t.logprob
        return gain, gain


class Sapo(Gate):
    """g± = 4/τ± · σ(τ±·(r - 1)), a gate that closes softly on both sides  (SAPO, arXiv 2511.20347)."""

    def __init__(self, tau_positive: float = 1.0, tau_negative: float = 1.05) -> None:
        self.taus = tau_positive, tau_negative

    def gains(self, t: LossTokens, ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        up, down = (4 / tau * torch.sigmoid(tau * (ratio - 1)) for tau in self.taus)
        return up, down


class Dppo(Gate):
    """g = keep · detached min(r, cap) · log π_θ: a token that has moved too far is left out, judged by the
    probabilities p of π_θ and q of μ in place of their ratio  (DPPO, arXiv 2602.04879).

    ``dppo-tv`` keeps p - q <= δ where the advantage is positive, p - q >= -δ where it is negative.
    """

    def __init__(self, delta: float = 0.15, ratio_cap: float = 20.0) -> None:
        self.delta, self.cap = delta, ratio_cap

    def gains(self, t: LossTokens, ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        up, down = self.kept(t.logprob.detach().exp(), t.behaviour.exp())
        gain = ratio.detach().clamp(max=self.cap) * t.logprob
        return up * gain, down * gain

    def kept(self, p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[M] whether a token is kept, by the sign of the advantage."""
        return p - q <= self.delta, p - q >= -self.delta


class DppoKl(Dppo):
    """DPPO by the divergence KL(q‖p) of "this token or another": beyond δ, a token is kept only where the
    step leads back.
    """

    def __init__(self, delta: float = 0.05, ratio_cap: float = 20.0) -> None:
        super().__init__(delta, ratio_cap)

    def kept(self, p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tiny = torch.finfo(p.dtype).tiny
        other_p, other_q = (1 - p).clamp(min=tiny), (1 - q).clamp(min=tiny)
        kl = q * (q.clamp(min=tiny) / p.clamp(min=tiny)).log() + other_q * (other_q / other_p).log()
        near = kl <= self.delta
        return near | (p <= q), near | (p >= q)


class Topr(Gate):
    """g⁺ = log π_θ, g⁻ = detached min(r, 1) · log π_θ: good samples are imitated, bad ones count less the
    less likely they have become  (TOPR, arXiv 2503.14286, per token as in ROLL's agentic pipeline).

    Good and bad are told by the sign of the advantage; ROLL tells them by the score, which is the same where
    rewards are binary and centred.
    """

    def gains(self, t: LossTokens, ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return t.logprob, ratio.detach().clamp(max=1) * t.logprob


class TurnClip(Gate):
    """PPO-clip on the ratio of a whole turn, s = exp(mean over its tokens of log r): AT²PO's objective (arXiv
    2601.04767).  Each token has the value s and the gradient s.

    Exact on trees, for a turn is a node.  There is no dual clip.
    """

    def __init__(self, eps_low: float = 3e-3, eps_high: float = 4e-3) -> None:
        self.low, self.high = 1 - eps_low, 1 + eps_high

    def unit(self, t: LossTokens) -> torch.Tensor:
        """[M] int64: tokens of one number share a ratio."""
        return t.node

    def bounds(self, t: LossTokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Lowest and highest ratio, of all tokens or [M]."""
        return t.logprob.new_tensor(self.low), t.logprob.new_tensor(self.high)

    def gains(self, t: LossTokens, ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_ratio, unit = t.logprob.detach() - t.behaviour, self.unit(t)
        units = int(unit.max()) + 1
        total = log_ratio.new_zeros(units).index_add(0, unit, log_ratio)
        count = log_ratio.new_zeros(units).index_add(0, unit, torch.ones_like(log_ratio))
        mean = (total / count.clamp(min=1))[unit]
        s = (mean.clamp(max=_MOST_LOG_RATIO) + t.logprob - t.logprob.detach()).exp()
        low, high = self.bounds(t)
        return s.clamp(max=high), s.clamp(min=low)


class GainTurnClip(TurnClip):
    """The same between 1 - c·ε_low and 1 + c·ε_high, where c goes by what the turn's result gained: A²TGPO's
    adaptive clip (arXiv 2605.06200), c = 1 + β·(2σ(N) - 1) (:func:`system.learn.credit.gain.clip_scale`).

    The turn of the answer, and one whose gain is unknown, has c = 1.  Needs ``rollout.score_answer=true``.
    """

    scales: ClassVar[bool] = True

    def __init__(self, eps_low: float = 3e-3, eps_high: float = 4e-3, beta: float = 0.3) -> None:
        if not 0 <= beta < 1:
            raise PluginError(f"learn.objective.options.beta={beta:g}: it must lie within 0 and below 1")
        super().__init__(eps_low, eps_high)
        self.eps_low, self.eps_high, self.beta = eps_low, eps_high, beta

    def clip_scale(self, tree: TreeStats) -> Float64:
        return clip_scale(tree, self.beta)

    def bounds(self, t: LossTokens) -> tuple[torch.Tensor, torch.Tensor]:
        c = self._scale(t)
        return 1 - c * self.eps_low, 1 + c * self.eps_high

    def loss(self, t: LossTokens) -> tuple[torch.Tensor, Statistics]:
        loss, statistics = super().loss(t)
        statistics.maxima["clip_scale_max"] = self._scale(t).amax()
        return loss, statistics

    def _scale(self, t: LossTokens) -> torch.Tensor:
        """[M] c of each token."""
        return torch.ones_like(t.mult) if t.clip_scale is None else t.clip_scale


class Gspo(TurnClip):
    """The same on the ratio of a whole answer: GSPO (arXiv 2507.18071 §4).

    The leaves below a token have ratios of their own, so that this trains flattened paths: a shared token is
    computed once for each leaf.
    """

    flat: ClassVar[bool] = True

    def __init__(self, eps_low: float = 3e-4, eps_high: float = 4e-4) -> None:
        super().__init__(eps_low, eps_high)

    def unit(self, t: LossTokens) -> torch.Tensor:
        return t.path


class M2po(Ppo):
    """PPO-clip on r = π_θ/μ between exp(-τ) and exp(τ), where τ keeps a second moment within ``budget``: the
    mean of min(log² r, τ²) over the harmful tokens of the optimizer step, those that the step would move
    further (A > 0 and r > 1, or A < 0 and r < 1)  (M2PO, arXiv 2510.01161, as the authors' code).

    Of the values log² r, τ² is the largest that stays below the budget; without a need there is no clip.
    ``floor_low`` and ``floor_high`` are the narrowest clip (the authors' function has 0.3 and 0.5, their
    script none).  There is no dual clip.  τ needs the log-probabilities of the whole step, so that every
    step costs a forward pass, but the first of a batch that is corrected (``learn.correction``).
    """

    adapts: ClassVar[bool] = True

    def __init__(self, budget: float = 0.04, floor_low: float = 0.0, floor_high: float = 0.0) -> None:
        if not budget > 0 or not 0 <= floor_low < 1 or not floor_high >= 0:
            raise PluginError(
                f"budget={budget:g}, floor_low={floor_low:g}, floor_high={floor_high:g}: budget above 0, "
                "floor_low within 0 and 1, floor_high 0 or more"
            )
        super().__init__(1.0, math.inf, 0.0)
        self.budget, self.floors = budget, (floor_low, floor_high)

    def adapt(self, log_ratio: torch.Tensor, leaves: torch.Tensor) -> None:
        tau = self.bound(log_ratio.double(), leaves.double())
        low, high = self.floors
        self.clip_low = max(1 - math.exp(-tau), low)
        self.clip_high = max(math.expm1(min(tau, MAX_LOG_RATIO)), high)

    def bound(self, log_ratio: torch.Tensor, leaves: torch.Tensor) -> float:
        """τ; infinite if the budget holds without."""
        count = torch.where(log_ratio > 0, leaves[:, 0], torch.where(log_ratio < 0, leaves[:, 1], 0))
        square, order = log_ratio.square()[count > 0].sort()
        count = count[count > 0][order]
        total, n = float((count * square).sum()), float(count.sum())
        if not n or total / n <= self.budget + 1e-12:
            return math.inf
        # The sum of min(square, τ²) at each τ² = square, of which the ones before contribute themselves.
        before, number = (count * square).cumsum(0) - count * square, count.cumsum(0) - count
        below = before + square * (n - number) < n * self.budget - 1e-12
        fits = int(below.sum())  # the sum rises with τ
        # Just inside, so that the token that sets it is clipped as in the authors' code, in float32, too.
        return max(float(square[fits - 1]) ** 0.5 - 1e-6, 0.0) if fits else 0.0


class AepoClip(Ppo):
    """PPO-clip whose clipped tokens of positive advantage keep the gradient 1 + ε_high: AEPO's balanced
    clipping (arXiv 2510.14545 §3.3).  The value is PPO's.  The paper limits this to tokens of high entropy,
    the released code does it to all; so does this.
    """

    def clipped(self, ratio: torch.Tensor, t: LossTokens) -> tuple[torch.Tensor, Statistics]:
        gain, statistics = super().clipped(ratio, t)
        straight = (1 + self.clip_high) * (t.logprob - t.logprob.detach()).exp()
        beyond = ratio.detach() > 1 + self.clip_high
        return gain + torch.where(beyond, t.s_plus * (straight - straight.detach()), 0), statistics
