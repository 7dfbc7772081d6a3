"""Routing replay (R3, arXiv 2510.11370): the policy is trained through the experts that the engine chose.

A router that is a little off, by rounding or by a newer version, sends a token to other experts, and its
log-probability is then off by a lot.  So the learner takes the recorded experts of each token, and weighs
them by the router's scores of now, which keep their gradient.  Tokens without a record choose freely.

The record travels with the rest of the row.  Every pass over a row hands it to the routers as a part of
Megatron's ``padding_mask``, which recomputation hands to them once more: nothing is kept in the model, and so
nothing can be left there for another row, nor for the reference model.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from system.models.experts import Experts
from system.tree.routes import Routes, recorded


class RoutesOfRow:
    """The experts of this rank's n tokens of a packed row."""

    def __init__(self, routes: Routes, index: NDArray[np.integer] | None, device: torch.device) -> None:
        """``routes`` [N, S, k] of the whole row; ``index`` [n]: which tokens are this rank's; None: all."""
        own = routes if index is None else routes[index]
        chosen = own.astype(np.int64)
        chosen[~recorded(own)] = -1
        self._named = 1 + int(chosen.max(initial=-1))  # experts that there must be
        self._chosen = torch.from_numpy(chosen).to(device)  # [n, S, k]; -1: no record

    def beside(self, padding: torch.Tensor, experts: Experts | None, layers: range) -> torch.Tensor:
        """``[n, 1 + s·E]`` bool: ``padding`` ``[n]``, then for each of the s sparse layers among ``layers``,
        those of a stage, the experts that are to be taken; none of a layer's: the token chooses.

        Raises ValueError for a record of another model than one with ``experts``.
        """
        own = (experts.layers, experts.chosen, experts.count) if experts else (0, 0, 0)
        found = (*self._chosen.shape[1:], self._named)
        if experts is None or found[:2] != own[:2] or found[2] > own[2]:
            raise ValueError(
                "the trees' routes are of another model: {} layers, {} experts of {} or more; this one has "
                "{}, {} of {}".format(*found, *own)
            )
        before = sum(experts.at(layer) for layer in range(layers.start))
        here = sum(experts.at(layer) for layer in layers)
        chosen = self._chosen[:, before : before + here]
        # One place more, for tokens without a record.
        taken = padding.new_zeros(len(padding), here, experts.count + 1)
        taken.scatter_(2, chosen.where(chosen >= 0, experts.count), True)
        return torch.cat([padding[:, None], taken[..., :-1].flatten(1)], 1)


def split(mask: torch.Tensor, place: int, experts: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(padding ``[n]``, experts to be taken ``[n, E]``), bool, of what a router gets: the ``place``-th of its
    stage's sparse layers.  None where the row has no record.
    """
    parts = mask.reshape(len(mask), -1)
    if parts.shape[1] == 1:
        return parts[:, 0], None
    begin = 1 + place * experts
    return parts[:, 0], parts[:, begin : begin + experts]


class Forced:
    """In megatron-core's words what it asks in place of a top-k: the experts that are given, or its own."""

    def __init__(self, taken: torch.Tensor) -> None:
        """``taken`` ``[n, E]`` bool: k of a token, or none."""
        self._taken = taken
        self.free: torch.Tensor | None = None  # [n, k] what the scores would have chosen

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, _groups: object, _group_topk: object, choose: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and numbers ``[n, k]`` of the experts, of ``scores`` ``[n, E]``."""
        self.free = scores.detach().topk(topk, dim=1).indices
        given = self._taken.to(torch.int8).topk(topk, dim=1).indices
        index = torch.where(self._taken.any(1, keepdim=True), given, self.free)
        return scores.gather(1, index), index

    def counts(self, real: torch.Tensor) -> torch.Tensor:
        """``[2]`` of the ``real`` tokens (bool ``[n]``), those whose experts were given, and of these those
        whose scores would have chosen others.
        """
        assert self.free is not None
        given = self._taken.any(1) & real
        same = self._taken.gather(1, self.free).all(1)
        return torch.stack([given.sum(), (given & ~same).sum()])
