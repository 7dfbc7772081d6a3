"""A weight for each leaf by how far off-policy its whole path is: sequence-level corrections, by name.

A path's ratio is the product, or the geometric mean, of ρ = π_prox/μ over its MODEL tokens, with the policy
π_prox that a training batch begins with and the policy μ that sampled.  Leaves that share a token have paths,
and so weights, of their own: no factor per token could say that, but the leaf's advantage times its weight
does, in S+ and S- (:func:`system.tree.plan.reweighed`), and a tree stays exactly its flattened paths.

It costs a forward pass, unless the engine scored the turns (``learn.proximal=closed``): the packed rows are
scored before the first update, each node's sums are added up over the ranks, and every rank makes the same
weights of them.  The scores are kept as ``proximal`` for the later updates, which then need no other pass.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from system.learn.divergence import MAX_LOG_RATIO, MEASURES, Band, divergence
from system.learn.objective import Objective
from system.plugins import PluginError, blaming
from system.tree.plan import Assigned, MicroBatch
from system.tree.record import Float64, Kind

OVERS = ("sum", "mean", "max")


@dataclass(frozen=True)
class LeafRatios:
    """The log-ratios log ρ of the MODEL tokens on the paths to n leaves, float64, in nats."""

    tokens: torch.Tensor  # [n] how many
    sums: torch.Tensor  # [n, 3] Σ k1, Σ k2, Σ k3 (:mod:`system.learn.divergence`); Σ log ρ is -Σ k1
    least: torch.Tensor  # [n] the smallest
    most: torch.Tensor  # [n] the largest

    def divergence(self, measure: str, over: str) -> torch.Tensor:
        """[n] the sum, mean or maximum of k1, k2 or k3 over each path."""
        if over == "max":  # k2 and k3 are convex, k1 falls
            return torch.maximum(divergence(measure, self.least), divergence(measure, self.most))
        total = self.sums[:, MEASURES.index(measure)]
        return total if over == "sum" else total / self.tokens


class Correction(ABC):
    """The leaf weights of a training batch.  A user's own is named ``learn.correction=package.module:Name``;
    its constructor's parameters are its options (``learn.correction.options``).

    What a weight acts on is the policy gradient alone.  The denominator of the mean keeps every leaf and
    token (AReaL and slime do so; verl divides by what is left), and so do entropy bonus, KL term and
    statistics.  The advantages stay the credit's over all leaves: a rejected leaf is still in its group's
    mean and deviation.  So it is in slime; verl shrinks its mask before it makes advantages, so that there
    rejected ones are missing from what is whitened over tokens (REINFORCE++), though not from GRPO's groups.
    """

    none: ClassVar[bool] = False  # nothing is corrected, and nothing scored
    importance: ClassVar[bool] = False  # the weights stand for ρ itself, rather than accept or reject

    @abstractmethod
    def weights(self, leaves: LeafRatios) -> torch.Tensor:
        """[n] the weight of each leaf, finite and 0 or more; 0 rejects it.

        ``leaves``: those of the whole batch that are trained on.  Leaves of trees without signal, which are
        not scored unless a regulariser needs them, are not among them.
        """


class NoCorrection(Correction):
    """Every leaf as it is."""

    none: ClassVar[bool] = True

    def weights(self, leaves: LeafRatios) -> torch.Tensor:
        return torch.ones_like(leaves.tokens)


class SequenceTis(Correction):
    """w = min(exp(Σ log ρ), ``cap``): truncated importance sampling of whole answers, as in verl and slime.

    ``over="mean"``: the geometric mean.  ``mode``: ``truncate``; ``clip`` also raises to ``low``; ``mask`` is
    0 outside of ``low`` and ``cap`` (MIS: masked importance sampling).  ``normalize``: divide by the mean
    over the batch's leaves (verl's batch_normalize).  ``veto``: a leaf with a token of ρ below it has weight
    0 (slime); 0: off.
    """

    importance: ClassVar[bool] = True

    def __init__(
        self,
        cap: float = 2.0,
        low: float = 0.0,
        mode: str = "truncate",
        over: str = "sum",
        normalize: bool = False,
        veto: float = 0.0,
    ) -> None:
        if mode not in ("truncate", "clip", "mask") or over not in ("sum", "mean"):
            raise PluginError(f"mode={mode!r}, over={over!r}: truncate, clip or mask, and sum or mean")
        if not 0 <= low < cap:
            raise PluginError(f"low={low:g}, cap={cap:g}: 0 <= low < cap")
        self.low, self.cap, self.mode, self.over, self.normalize = low, cap, mode, over, normalize
        self.veto = _log_veto(veto)

    def weights(self, leaves: LeafRatios) -> torch.Tensor:
        full = (-leaves.divergence("k1", self.over)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        if self.mode == "mask":
            weight = torch.where((full >= self.low) & (full <= self.cap), full, 0.0)
        else:
            weight = full.clamp(self.low if self.mode == "clip" else None, self.cap)
        if self.normalize:
            weight = weight / weight.mean().clamp(min=1e-8)
        return torch.where(leaves.least >= self.veto, weight, 0.0)


class SequenceMis(SequenceTis):
    """``seq-tis`` with ``mode=mask``: the answer's ratio within 0.5 and 2, 0 outside  (MIS)."""

    def __init__(
        self,
        cap: float = 2.0,
        low: float = 0.5,
        over: str = "sum",
        normalize: bool = False,
        veto: float = 0.0,
    ) -> None:
        super().__init__(cap, low, "mask", over, normalize, veto)


class SequenceRejection(Correction):
    """w = 1 where the path's divergence lies within bounds (:class:`system.learn.divergence.Band`), else 0.

    ``measure`` k1, k2 or k3 ``over`` the path: ``sum``, ``mean`` or ``max``: verl's seq_sum_k1 and so on.
    ``veto`` as in :class:`SequenceTis`.
    """

    def __init__(
        self, measure: str = "k1", over: str = "sum", low: float = 0.5, high: float = 2.0, veto: float = 0.0
    ) -> None:
        if measure not in MEASURES or over not in OVERS:
            raise PluginError(
                f"measure={measure!r}, over={over!r}: one of {', '.join(MEASURES)}, and of {', '.join(OVERS)}"
            )
        self.band, self.over, self.veto = Band(measure, low, high), over, _log_veto(veto)

    def weights(self, leaves: LeafRatios) -> torch.Tensor:
        kept = self.band.holds(leaves.divergence(self.band.measure, self.over))
        return (kept & (leaves.least >= self.veto)).double()


class GeometricRejection(SequenceRejection):
    """Rejection by the geometric mean of ρ, with verl's bounds (seq_mean_k1), which are for what engine and
    learner differ in numerically: stale samples want wider ones.
    """

    def __init__(self, low: float = 0.999, high: float = 1.001, veto: float = 0.0) -> None:
        super().__init__("k1", "mean", low, high, veto)


def _log_veto(veto: float) -> float:
    if not 0 <= veto < 1:
        raise PluginError(f"veto={veto:g}: 0 (off), or the smallest ρ that a token may have, below 1")
    return math.log(veto) if veto else -math.inf


class NodeRatios:
    """What of a batch's log-ratios adds up along paths: sums and extremes of each node's tokens.

    A node's weights stand in one part of one rank's rows, so that its tokens are scored once among all of
    them; a flattened path's nodes are scored once for each path, and averaged.
    """

    def __init__(self, batch: Assigned, device: torch.device) -> None:
        self._batch = batch
        # [trees + 1] where each tree's nodes begin, among all of the batch
        self._first = np.cumsum([0, *(tree.nodes for tree in batch.trees)])
        nodes = int(self._first[-1])
        self._sums = torch.zeros(nodes, 1 + len(MEASURES), dtype=torch.float64, device=device)  # and how many
        self._extremes = torch.full((nodes, 2), -torch.inf, dtype=torch.float64, device=device)  # -d, d

    def add(self, parts: MicroBatch, node: NDArray[np.int32], log_ratio: torch.Tensor) -> None:
        """The scored tokens of one row: [M] which node of the row's ``parts``, counted through, each is of,
        and [M] its log ρ.
        """
        among = np.concatenate([self._first[part.tree] + part.nodes for part in parts])
        index = torch.from_numpy(among[node]).to(self._sums.device)
        d = log_ratio.to(self._sums)
        each = [torch.ones_like(d), *(divergence(measure, d) for measure in MEASURES)]
        self._sums.index_add_(0, index, torch.stack(each, 1))
        both = index[:, None].expand(-1, 2)
        self._extremes.scatter_reduce_(0, both, torch.stack([-d, d], 1), "amax")

    def reduce(self, groups: Sequence[dist.ProcessGroup]) -> None:
        """Over the ranks of all ``groups``, one after the other; collective."""
        for group in groups:
            dist.all_reduce(self._sums, group=group)
            dist.all_reduce(self._extremes, op=dist.ReduceOp.MAX, group=group)

    def leaves(self) -> tuple[list[NDArray[np.bool_]], LeafRatios]:
        """Per tree [L] whether a leaf weighs anything and its whole path was scored; these leaves' ratios."""
        chosen: list[NDArray[np.bool_]] = []
        sums: list[torch.Tensor] = [torch.zeros(0, self._sums.size(1), dtype=torch.float64)]
        extremes: list[torch.Tensor] = [torch.zeros(0, 2, dtype=torch.float64)]
        for number, (tree, weight) in enumerate(zip(self._batch.trees, self._batch.weights, strict=True)):
            mine = slice(int(self._first[number]), int(self._first[number + 1]))
            sampled = torch.from_numpy(tree.kind == Kind.MODEL)[:, None]  # an expert's tokens have no ratio
            node_sums = torch.where(sampled, self._sums[mine].cpu(), 0)
            node_extremes = torch.where(sampled, self._extremes[mine].cpu(), -torch.inf)
            missing = (tree.kind == Kind.MODEL) & (node_sums[:, 0].numpy() == 0)
            chosen.append((np.asarray(weight) > 0) & ~(tree.on_path & missing).any(1))
            path = torch.from_numpy(tree.on_path[chosen[-1]])
            times = (node_sums[:, :1] / torch.from_numpy(tree.length)[:, None]).clamp(min=1)
            sums.append(path.double() @ (node_sums / times))
            extremes.append(torch.where(path[..., None], node_extremes, -torch.inf).amax(1))
        total, extreme = torch.cat(sums), torch.cat(extremes)
        return chosen, LeafRatios(total[:, 0], total[:, 1:], -extreme[:, 0], extreme[:, 1])


def weigh(correction: Correction, leaves: LeafRatios) -> torch.Tensor:
    """The correction's weights, checked: [n], float64.  Raises :class:`PluginError`."""
    name = f"correction {type(correction).__name__}"
    with blaming(name):
        weights = torch.as_tensor(correction.weights(leaves), dtype=torch.float64)
    if weights.shape != leaves.tokens.shape:
        raise PluginError(f"{name}: weights of shape {[*weights.shape]} for {len(leaves.tokens)} leaves")
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise PluginError(f"{name}: a weight is negative or not finite")
    return weights


def spread(weights: torch.Tensor, chosen: Sequence[NDArray[np.bool_]]) -> list[Float64]:
    """Per tree [L] the weights [n] of the leaves that are ``chosen``, and 1 for the others."""
    factors = [np.ones(mask.shape) for mask in chosen]
    ends = np.cumsum([mask.sum() for mask in chosen])
    for factor, mask, own in zip(factors, chosen, np.split(weights.cpu().numpy(), ends[:-1]), strict=True):
        factor[mask] = own
    return factors


def twice_weighed(correction: Correction, objective: Objective) -> str | None:
    """A warning if leaves and tokens are both weighed by their ratio."""
    if not (correction.importance and objective.importance):
        return None
    return (
        "learn.correction weighs each leaf by its ratio to the policy that sampled, and learn.objective its "
        "tokens by theirs: learn.objective=decoupled learn.objective.options.tis=none leaves the former alone"
    )


def effect(weights: torch.Tensor) -> dict[str, float]:
    """What a correction did to n leaves: the share it rejected, and the effective sample size of the weights
    as a share, (Σw)²/(n·Σw²): 1 where all are equal.
    """
    n, squares = max(weights.numel(), 1), float((weights * weights).sum())
    return {
        "learn/rejected_leaves": float((weights == 0).sum()) / n,
        "learn/effective_sample_size": float(weights.sum()) ** 2 / (n * squares) if squares else 0.0,
    }
