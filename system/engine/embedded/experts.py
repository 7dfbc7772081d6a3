"""Sparse layers of the engine: the router's choice for each token, and the MLPs of the chosen experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from system.models.experts import Experts


def choose(x: Tensor, router: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
    """Which experts the tokens ``x`` ``[T, E]`` go through, int64 ``[T, k]``, and their weights ``[T, k]``.

    ``router`` ``[n, E]``.  The softmax over all n experts is in float32, as in Hugging Face's models.
    """
    scores = F.linear(x, router).softmax(-1, dtype=torch.float32)
    weight, choice = scores.topk(experts.chosen, -1)
    if experts.normalised:
        weight = weight / weight.sum(-1, keepdim=True)
    return choice, weight.to(x.dtype)


def mixture(x: Tensor, choice: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """``[T, E]``: for each token the outputs of its chosen experts, weighed and added.

    ``choice`` and ``weight`` ``[T, k]``; ``gate_up`` ``[n, 2F, E]`` and ``down`` ``[n, E, F]``, the experts'.
    The tokens are put into the experts' order, so that one grouped product computes all experts.
    """
    expert = choice.flatten()
    order = expert.argsort(stable=True)
    token = order // choice.shape[1]
    ends = expert.bincount(minlength=len(gate_up)).cumsum(0).int()  # one past each expert's last row
    gate, up = F.grouped_mm(x[token], gate_up.mT, offs=ends).chunk(2, -1)
    out = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends) * weight.flatten()[order][:, None]
    return x.new_zeros(x.shape).index_add_(0, token, out)
