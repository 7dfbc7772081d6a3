"""Log-probability and entropy over a vocabulary that is split across tensor-parallel ranks, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

CHUNK = 1 << 20  # logits that are in float32 at one time on CPU: 4 MB, near the size of a core's cache


class _VocabParallelLogprobEntropy(torch.autograd.Function):
    """Two all-reduces forward (maximum; the three sums together), none backward.

    With z = (logits - max) / temperature, Z = Σ e^z:  log p[y] = z[y] - log Z  and  H = log Z - Σ z e^z / Z,
    so both come out of the same three sums.  Only the logits and three scalars per row are kept for the
    backward pass: ∂log p[y]/∂z_v = 1[v = y] - p_v  and  ∂H/∂z_v = -p_v (log p_v + H).  The float32 values
    exist for a few rows at a time on CPU, and in a fused kernel's registers only on GPU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        vocab_size: int,
        temperature: float,
        group: dist.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first = dist.get_rank(group) * logits.size(-1)
        real = max(0, min(logits.size(-1), vocab_size - first))  # columns past it only pad the vocabulary
        mine = logits[:, :real]
        # A rank may hold padding only (a vocabulary smaller than its padded share): it adds nothing to any
        # sum.
        maximum = mine.amax(-1).float() if real else logits.new_full((len(logits),), -torch.inf).float()
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        local = target - first
        inside = (local >= 0) & (local < real)
        index = torch.where(inside, local, 0)[:, None]
        own = (
            (mine.gather(-1, index)[:, 0].float() - maximum) / temperature
            if real
            else torch.zeros_like(maximum)
        )
        sums = torch.stack([torch.where(inside, own, 0.0), torch.zeros_like(own), torch.zeros_like(own)])
        for rows in _chunks(mine):
            sums[1:, rows] = _on(mine.device, _exponentials)(mine[rows], maximum[rows], temperature)
        dist.all_reduce(sums, group=group)
        log_z = sums[1].log()
        entropy = log_z - sums[2] / sums[1]
        ctx.save_for_backward(logits, maximum, log_z, entropy, index, inside)
        ctx.real, ctx.temperature = real, temperature
        return sums[0] - log_z, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_logprob, grad_entropy = grads
        logits, maximum, log_z, entropy, index, inside = ctx.saved_tensors
        real, temperature = ctx.real, ctx.temperature
        out = torch.zeros_like(logits) if real < logits.size(-1) else torch.empty_like(logits)
        for rows in _chunks(logits[:, :real]):
            out[rows, :real] = _on(logits.device, _gradient)(
                logits[rows, :real],
                *(t[rows] for t in (maximum, log_z, entropy, index, inside, grad_logprob, grad_entropy)),
                temperature,
            )
        return out, None, None, None, None


def _exponentials(logits: torch.Tensor, maximum: torch.Tensor, temperature: float) -> torch.Tensor:
    """[2, M] float32: Σ e^z and Σ z e^z over this rank's columns."""
    z = (logits.float() - maximum[:, None]) / temperature
    e = z.exp()
    return torch.stack([e.sum(-1), (e * z).sum(-1)])


def _gradient(
    logits: torch.Tensor,
    maximum: torch.Tensor,
    log_z: torch.Tensor,
    entropy: torch.Tensor,
    index: torch.Tensor,
    inside: torch.Tensor,
    grad_logprob: torch.Tensor,
    grad_entropy: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """The logits' gradient, in their dtype."""
    logp = (logits.float() - maximum[:, None]) / temperature - log_z[:, None]
    grad = logp.exp() * (-grad_logprob[:, None] - (logp + entropy[:, None]) * grad_entropy[:, None])
    column = torch.arange(logits.size(-1), device=logits.device)
    grad = grad + torch.where((column == index) & inside[:, None], grad_logprob[:, None], 0.0)
    return (grad / temperature).to(logits.dtype)


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    """Rows that are worked on together: all of them on a GPU, whose fused kernels keep nothing of them."""
    if not logits.numel():
        return
    rows = len(logits) if logits.is_cuda else max(1, CHUNK // logits.size(-1))
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)


def _on(device: torch.device, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return _compiled(function) if device.type == "cuda" else function


@cache
def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return torch.compile(function, dynamic=True)


def vocab_parallel_logprob_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    vocab_size: int,
    group: dist.ProcessGroup,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of ``target`` and entropy under softmax(logits / temperature), ``[M]`` float32 nats.

    ``logits`` ``[M, V/tp]`` is this rank's contiguous share of the (padded) vocabulary, any floating dtype,
    not modified, divided in float32; ``target`` ``[M]`` int64 holds global token ids below ``vocab_size``.
    Columns from ``vocab_size`` on are padding and get probability zero.  Every rank of ``group`` calls it
    with the same rows and receives the same result.
    """
    out = _VocabParallelLogprobEntropy.apply(logits, target, vocab_size, temperature, group)
    assert isinstance(out, tuple)
    return out
