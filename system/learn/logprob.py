"""Log-probability and entropy over a vocabulary that is split across tensor-parallel ranks, in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _VocabParallelLogprobEntropy(torch.autograd.Function):
    """Two all-reduces forward (maximum; the three sums together), none backward.

    With z = logits - max, Z = Σ e^z:  log p[y] = z[y] - log Z  and  H = log Z - Σ z e^z / Z, so both come out
    of the same three sums.  Only the logits and two scalars per row are kept for the backward pass: ∂log
    p[y]/∂logit_v = 1[v = y] - p_v  and  ∂H/∂logit_v = -p_v (log p_v + H).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, vocab_size: int, group: dist.ProcessGroup
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first = dist.get_rank(group) * logits.size(-1)
        real = max(0, min(logits.size(-1), vocab_size - first))  # columns past it only pad the vocabulary
        z = logits[:, :real].float()
        # A rank may hold padding only (a vocabulary smaller than its padded share): it adds nothing to any
        # sum.
        maximum = z.amax(-1) if real else z.new_full((z.size(0),), float("-inf"))
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        z = z - maximum[:, None]
        local = target - first
        inside = (local >= 0) & (local < real)
        index = torch.where(inside, local, 0)[:, None]
        own = z.gather(-1, index)[:, 0] if real else z.new_zeros(z.size(0))
        e = z.exp()
        sums = torch.stack([torch.where(inside, own, 0.0), e.sum(-1), (e * z).sum(-1)])
        dist.all_reduce(sums, group=group)
        log_z = sums[1].log()
        entropy = log_z - sums[2] / sums[1]
        ctx.save_for_backward(logits, maximum + log_z, entropy, index, inside)
        ctx.real = real
        return sums[0] - log_z, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_logprob, grad_entropy = grads
        logits, log_normaliser, entropy, index, inside = ctx.saved_tensors
        real = ctx.real
        logp = logits[:, :real].float() - log_normaliser[:, None]
        p = logp.exp()
        grad = p * (-grad_logprob[:, None] - (logp + entropy[:, None]) * grad_entropy[:, None])
        if real:
            grad.scatter_add_(-1, index, (grad_logprob * inside)[:, None])
        out = torch.zeros_like(logits)
        out[:, :real] = grad.to(logits.dtype)
        return out, None, None, None


def vocab_parallel_logprob_entropy(
    logits: torch.Tensor, target: torch.Tensor, vocab_size: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of ``target`` and entropy of the whole distribution, both ``[M]`` float32, in nats.

    ``logits`` ``[M, V/tp]`` is this rank's contiguous share of the (padded) vocabulary, any floating dtype,
    not modified; ``target`` ``[M]`` int64 holds global token ids below ``vocab_size``.  Columns from
    ``vocab_size`` on are padding and get probability zero.  Every rank of ``group`` calls it with the same
    rows and receives the same result.
    """
    out = _VocabParallelLogprobEntropy.apply(logits, target, vocab_size, group)
    assert isinstance(out, tuple)
    return out
