"""Training objectives over the tokens of a packed row, by name, and the statistics they leave behind.

All leaves below a token share its ratio r, so clipping is exact with two weights per token,
S⁺ = Σ w·max(A, 0) and S⁻ = Σ w·min(A, 0) over those leaves:

    Σ_leaf w·min(r·A, clip(r, 1-ε_lo, 1+ε_hi)·A)  =  S⁺·min(r, 1+ε_hi) + S⁻·max(r, 1-ε_lo)

and with dual clipping (Ye et al., arXiv 1912.09729), which bounds the loss of a bad action that became
likely, the last factor is min(max(r, 1-ε_lo), c).  The weights are normalised over the optimizer step, so
losses only add up.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.distributed as dist

from system.config import LearnConfig
from system.learn.distill import reverse_kl
from system.learn.divergence import MEASURES, Band, divergence, exp_ratio, k3
from system.plugins import OBJECTIVES, PluginError
from system.tree.record import Float64
from system.tree.stats import TreeStats

# Statistics that are totals of an optimizer step; the other sums are reported as means.
TOTALS = ("loss", "tokens", "tokens_computed")
# Statistics that are means over a part of the tokens, whose share of all is the other statistic.
PARTIAL = {"engine_kl": "fresh"}


@dataclass(frozen=True)
class LossTokens:
    """The M tokens of one packed row that are trained on; every tensor is ``[M]``, float32 but for ``node``
    and ``path``, log-probabilities in nats.
    """

    logprob: torch.Tensor  # under the current policy, with gradient
    entropy: torch.Tensor  # of the current policy at this token, with gradient
    behaviour: torch.Tensor  # log-probability the engine sampled with (μ)
    s_plus: torch.Tensor
    s_minus: torch.Tensor
    mult: torch.Tensor  # Σ w over the scored leaves below
    staleness: torch.Tensor  # versions between the sampling policy and the trained one
    node: torch.Tensor  # int64, 0 or more: tokens of one number are one turn of the agent, whole in this row
    path: torch.Tensor  # int64, 0 or more: tokens of one number are one root-to-leaf path, if ``flat``
    proximal: torch.Tensor | None = None  # under the policy at the start of the batch; None: the current one
    reference: torch.Tensor | None = None  # under the frozen reference model; None: no KL term
    teacher: torch.Tensor | None = None  # under the teacher, NaN where unknown; None: nobody teaches
    anchored: bool = False  # the proximal policy is the engine's at the close of each node, not the learner's
    guided: torch.Tensor | None = None  # 1 where μ was under another prompt than π_θ is; None: nowhere
    clip_scale: torch.Tensor | None = None  # what :meth:`Objective.clip_scale` said; None: 1 everywhere


@dataclass
class Statistics:
    """Sums and maxima that add up over micro-batches and data-parallel ranks."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)

    def zeros(self) -> Statistics:
        """The same statistics of nothing: none of them falls below zero."""
        return Statistics(
            {name: torch.zeros_like(value) for name, value in self.sums.items()},
            {name: torch.zeros_like(value) for name, value in self.maxima.items()},
        )

    def add(self, other: Statistics) -> None:
        """Of ``other`` what has a name here."""
        for name, value in self.sums.items():
            self.sums[name] = value + other.sums.get(name, 0)
        for name, value in self.maxima.items():
            self.maxima[name] = torch.maximum(value, other.maxima.get(name, value))

    def reduce(self, groups: Sequence[dist.ProcessGroup]) -> dict[str, float]:
        """Totals over the ranks of all ``groups``, one after the other; collective.

        Sums become means weighted by ``mult``, except the ``TOTALS``.
        """
        total = torch.stack([value.double() for value in self.sums.values()])
        top = torch.stack([value.double() for value in self.maxima.values()]) if self.maxima else None
        for group in groups:
            dist.all_reduce(total, group=group)
            if top is not None:
                dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        values = dict(zip(self.sums, total.tolist(), strict=True))
        weight = values.pop("weight")
        out = {
            name: value if name in TOTALS else value / weight if weight > 0 else 0.0
            for name, value in values.items()
        }
        for name, part in PARTIAL.items():
            if name in out:
                out[name] = out[name] / out[part] if out[part] > 0 else 0.0
        if top is not None:
            out |= dict(zip(self.maxima, top.tolist(), strict=True))
        return out


class Objective(ABC):
    """A loss over the tokens of one packed row.

    Its constructor's parameters are its options (``learn.objective.options``); ``clip_low``, ``clip_high``,
    ``dual_clip`` and ``tis_cap`` it gets from ``learn``, if it has parameters of these names.  A user's own
    is named ``learn.objective=package.module:Name``.
    """

    # Which ratio it clips: π_θ/μ, or π_θ/π_proximal with the policy at the start of the batch as the latter,
    # which the trainer then computes for every update but the first.
    ratio: ClassVar[Literal["behaviour", "proximal"]] = "behaviour"
    flat: ClassVar[bool] = False  # train root-to-leaf paths instead of trees
    supervised: ClassVar[bool] = False  # the model as it is: no temperature, no regularisers
    adapts: ClassVar[bool] = False  # it wants to see each optimizer step's tokens first: :meth:`adapt`
    scales: ClassVar[bool] = False  # its clip is wider for some turns than for others: :meth:`clip_scale`
    importance: bool = True  # it weighs tokens by π_θ/μ or π_prox/μ, so that leaves should not be, too

    @abstractmethod
    def loss(self, t: LossTokens) -> tuple[torch.Tensor, Statistics]:
        """The row's loss, without regularisers, and statistics beyond those that every row has
        (:func:`row_loss`); sums are to be weighted by ``t.mult``.
        """

    def adapt(self, log_ratio: torch.Tensor, leaves: torch.Tensor) -> None:
        """Before an optimizer step, if ``adapts``: [n] log π_θ/μ of the tokens of all ranks, and [n, 2] how
        many leaves below each have a positive, and a negative, advantage.
        """
        raise NotImplementedError

    def clip_scale(self, tree: TreeStats) -> Float64:
        """When a batch is planned, if ``scales``: [J] what the clip's width is multiplied by in the tokens of
        each node.
        """
        raise NotImplementedError


def make_objective(learn: LearnConfig) -> Objective:
    """The objective that the configuration names.  Raises :class:`system.plugins.PluginError`."""
    return OBJECTIVES.make(
        learn.objective.name,
        learn.objective.options,
        clip_low=learn.clip_low,
        clip_high=learn.clip_high,
        dual_clip=learn.dual_clip,
        tis_cap=learn.tis_cap,
    )


def inert_clip(objective: Objective, learn: LearnConfig, by_step: Collection[str] = ()) -> str | None:
    """A warning if somebody has set a clip that does nothing, or an average of the weights that does nothing.

    ``by_step``: the keys of ``run.by_step``.
    """
    if objective.ratio == "behaviour":
        return (
            f"learn.proximal={learn.proximal} has no effect: learn.objective={learn.objective.name} does not "
            "clip against a proximal policy (decoupled does)"
            if learn.proximal == "average" or (learn.proximal == "closed" and learn.correction.name == "none")
            else None
        )
    if objective.supervised or learn.updates > 1 or learn.proximal != "start":
        return None
    usual = LearnConfig()
    chosen = [
        f"learn.{name}"
        for name in ("clip_low", "clip_high", "dual_clip")
        if getattr(learn, name) != getattr(usual, name)
        or f"learn.{name}" in by_step
        or name in learn.objective.options
    ]
    if not chosen:
        return None
    return (
        f"{' and '.join(chosen)} will do nothing: learn.objective={learn.objective.name} clips the ratio to "
        "the policy at the start of the batch, which learn.updates=1 keeps at 1 (learn.objective=ppo clips "
        "the ratio to the policy that sampled)"
    )


def row_loss(
    objective: Objective,
    t: LossTokens,
    *,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    teacher_coef: float = 0.0,
    teacher_cap: float = math.inf,
) -> tuple[torch.Tensor, Statistics]:
    """A row's loss with its regularisers, and all its statistics.

    ``teacher_cap``: of the weight π_θ/μ in :func:`system.learn.distill.reverse_kl`.
    """
    loss, statistics = objective.loss(t)
    statistics.sums |= {
        "weight": t.mult.sum(),
        "tokens": t.mult.new_tensor(t.mult.numel()),
        "entropy": (t.mult * t.entropy.detach()).sum(),
    }
    if not objective.supervised:
        _measure_engine(t, statistics)
        if entropy_coef:
            loss = loss - entropy_coef * (t.mult * t.entropy).sum()
        if t.reference is not None:
            # GRPO's penalty (arXiv 2402.03300, eq. 4): k3 with the gradient through π_θ.
            kl = (t.mult * k3(t.reference - t.logprob)).sum()
            loss = loss + kl_coef * kl
            statistics.sums["reference_kl"] = kl.detach()
        if t.teacher is not None:
            kl = t.mult * reverse_kl(t.logprob, t.behaviour, t.teacher, teacher_cap)
            loss = loss + teacher_coef * kl.sum()
            statistics.sums["teacher_kl"] = kl.sum().detach()
            statistics.sums["teacher_scored"] = (t.mult * t.teacher.isfinite()).sum()
    statistics.sums["loss"] = loss.detach()
    return loss, statistics


def clipped_surrogate(
    ratio: torch.Tensor, s_plus: torch.Tensor, s_minus: torch.Tensor, low: float, high: float, dual: float
) -> torch.Tensor:
    """The per-token gain S⁺·min(r, 1+ε_hi) + S⁻·min(max(r, 1-ε_lo), c); ``dual`` c = 0 leaves the last
    bound out.
    """
    return s_plus * ratio.clamp(max=1 + high) + s_minus * ratio.clamp(1 - low, dual if dual > 0 else None)


class Ppo(Objective):
    """PPO-clip (Schulman et al., arXiv 1707.06347) with dual clip, on r = π_θ/μ."""

    def __init__(self, clip_low: float, clip_high: float, dual_clip: float) -> None:
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip

    def loss(self, t: LossTokens) -> tuple[torch.Tensor, Statistics]:
        gain, statistics = self.clipped(exp_ratio(t.logprob, t.behaviour), t)
        return -gain.sum(), statistics

    def clipped(self, ratio: torch.Tensor, t: LossTokens) -> tuple[torch.Tensor, Statistics]:
        """[M] gain of each token at the ratio that is clipped, and what the clip did."""
        gain = clipped_surrogate(ratio, t.s_plus, t.s_minus, self.clip_low, self.clip_high, self.dual_clip)
        r = ratio.detach()
        sums = {
            "ratio_mean": (t.mult * r).sum(),
            "clip_high": (t.mult * ((r > 1 + self.clip_high) & (t.s_plus > 0))).sum(),
            "clip_low": (t.mult * ((r < 1 - self.clip_low) & (t.s_minus < 0))).sum(),
        }
        return gain, Statistics(sums, {"ratio_max": r.amax()})


class FlatPpo(Ppo):
    """PPO-clip on root-to-leaf paths."""

    flat: ClassVar[bool] = True


class Decoupled(Ppo):
    """Decoupled PPO (Hilton et al., arXiv 2110.00641): clip r = π_θ/π_prox, weigh by truncated π_prox/μ.

    π_prox is the policy at the start of the batch; with one update per batch that is the current policy's own
    detached log-probability.  The importance weight ρ = π_prox/μ carries no gradient.  By ``tis`` it is held
    between ``tis_low`` and ``tis_cap`` (``truncate``), 0 outside of them (``mask``: IcePop, Ling team 2025,
    whose bounds are 0.5 and 5), or left out (``none``).  ``reject`` k1, k2 or k3 makes it 0 where the token's
    divergence lies outside of ``reject_low`` and ``reject_high`` (:class:`system.learn.divergence.Band`).
    What is masked or rejected still counts in the mean.
    """

    ratio: ClassVar[Literal["behaviour", "proximal"]] = "proximal"

    def __init__(
        self,
        clip_low: float,
        clip_high: float,
        dual_clip: float,
        tis_cap: float,
        tis_low: float = 0.0,
        tis: str = "truncate",
        reject: str = "none",
        reject_low: float = 0.0,
        reject_high: float = math.inf,
    ) -> None:
        super().__init__(clip_low, clip_high, dual_clip)
        if tis not in ("truncate", "mask", "none") or not 0 <= tis_low <= tis_cap:
            raise PluginError(
                f"tis={tis!r}, tis_low={tis_low:g}: truncate, mask or none, and 0 <= tis_low <= tis_cap"
            )
        if reject not in ("none", *MEASURES):
            raise PluginError(f"reject={reject!r}: none, or one of {', '.join(MEASURES)}")
        self.tis_cap, self.tis_low, self.tis = tis_cap, tis_low, tis
        self.importance = tis != "none"
        self.band = None if reject == "none" else Band(reject, reject_low, reject_high, "reject_")

    def proximal(self, t: LossTokens) -> torch.Tensor:
        """[M] log-probability under π_prox."""
        return t.logprob.detach() if t.proximal is None else t.proximal

    def loss(self, t: LossTokens) -> tuple[torch.Tensor, Statistics]:
        proximal = self.proximal(t)
        gain, statistics = self.clipped(exp_ratio(t.logprob, proximal), t)
        full = exp_ratio(proximal, t.behaviour)
        weight = full.clamp(self.tis_low, self.tis_cap)
        if self.tis == "mask":
            statistics.sums["tis_masked"] = (t.mult * (weight != full)).sum()
            weight = torch.where(weight == full, full, 0)
        elif self.tis == "none":
            weight = torch.ones_like(full)
        if self.band:
            kept = self.band.holds(divergence(self.band.measure, proximal - t.behaviour))
            weight = torch.where(kept, weight, 0)
            statistics.sums["tis_rejected"] = (t.mult * ~kept).sum()
        statistics.sums["tis_mean"] = (t.mult * weight).sum()
        statistics.sums["tis_capped"] = (t.mult * (full > self.tis_cap)).sum()
        return -(weight * gain).sum(), statistics


class LogLinear(Decoupled):
    """Decoupled PPO whose π_prox is not computed but put between π_θ and μ, in logarithms, by age: the
    log-linear proximal policy of A-3PO, as AReaL has it.

    log π_prox = log μ + α·(log π_θ - log μ), α = s/(s + 1), for a token sampled s versions before the one
    that the batch began with: π_θ is on its way from that one to the next.
    """

    ratio: ClassVar[Literal["behaviour", "proximal"]] = "behaviour"  # no pass for the proximal policy

    def proximal(self, t: LossTokens) -> torch.Tensor:
        age = t.staleness.clamp(min=0)
        return t.behaviour + age / (age + 1) * (t.logprob.detach() - t.behaviour)


class NegativeLogLikelihood(Objective):
    """Supervised learning's Σ -mult·log π_θ."""

    supervised: ClassVar[bool] = True

    def loss(self, t: LossTokens) -> tuple[torch.Tensor, Statistics]:
        return -(t.mult * t.logprob).sum(), Statistics()


def _measure_engine(t: LossTokens, statistics: Statistics) -> None:
    """How far the sampling policy is from the trained one: by staleness, and by the engines' numbers."""
    # Tokens that were sampled from the very weights that are trained: what differs there is numerical.
    fresh = t.mult * (t.staleness == 0)
    if t.guided is not None:
        fresh = fresh * (1 - t.guided)
    learners = t.logprob.detach() if t.proximal is None or t.anchored else t.proximal
    difference = learners - t.behaviour
    statistics.sums |= {
        # Sampled by μ, so this estimates KL(μ‖π_θ): staleness plus the engines' numerical differences.
        "mismatch_kl": (t.mult * k3(t.logprob.detach() - t.behaviour)).sum(),
        "engine_kl": (fresh * k3(difference)).sum(),
        "fresh": fresh.sum(),
        "staleness_mean": (t.mult * t.staleness).sum(),
    }
    statistics.maxima |= {
        "staleness_max": t.staleness.amax(),
        "engine_logprob_diff_max": ((fresh > 0) * difference.abs()).amax(),
    }
