"""The output projection with log-probability and entropy over a vocabulary that is split across
tensor-parallel ranks: the logits of a long row never exist all at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from system.learn import fused
from system.learn.sizes import LOGITS

CHUNK = 1 << 20  # logits in float32 at one time on CPU: 4 MB, near the size of a core's cache


class _ScoredProjection(torch.autograd.Function):
    """Two all-reduces forward (maximum; the three sums together), one backward (of the hidden states').

    With z = (logits - max) / temperature, Z = Σ e^z:  log p[y] = z[y] - log Z  and  H = log Z - Σ z e^z / Z,
    so both come out of the same three sums, which are first taken against this rank's own maximum.  For the
    backward pass, ∂log p[y]/∂z_v = 1[v = y] - p_v  and  ∂H/∂z_v = -p_v (log p_v + H), a chunk of rows is
    projected again, so that only the hidden states and a few scalars per row are kept.  A row of one chunk
    keeps its logits instead.  The float32 values exist for a few rows at a time on CPU, and in a fused
    kernel's registers only on GPU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        vocab_size: int,
        temperature: float,
        group: dist.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first = dist.get_rank(group) * len(weight)
        real = max(0, min(len(weight), vocab_size - first))  # columns past it only pad the vocabulary
        local = target - first
        inside = (local >= 0) & (local < real)
        index = torch.where(inside, local, 0)[:, None]
        # Of every row: its largest logit here, the target's, and the two sums.  A rank may hold padding only
        # (a vocabulary smaller than its padded share): it adds nothing to any sum.
        maximum, own, *sums = hidden.new_zeros((4, len(hidden)), dtype=torch.float32)
        maximum.fill_(-torch.inf)
        logits: torch.Tensor | None = None
        chunks = [*_chunks(len(hidden), len(weight), LOGITS)]
        for rows in chunks if real else []:
            logits = hidden[rows] @ weight[:real].t()
            maximum[rows] = logits.amax(-1)
            own[rows] = logits.gather(-1, index[rows])[:, 0]
            for some, part in _kernels(logits, rows.start):
                both = fused.on(logits.device, _exponentials)(logits[some], maximum[part], temperature)
                for total, values in zip(sums, both, strict=True):
                    total[part] = values
        top = maximum.clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        shift = (maximum - top) / temperature if real else torch.zeros_like(top)
        scale = shift.exp()
        target_z = torch.where(inside, (own - top) / temperature, 0.0)
        totals = torch.stack([target_z, scale * sums[0], scale * (sums[1] + shift * sums[0])])
        dist.all_reduce(totals, group=group)
        log_z = totals[1].log()
        entropy = log_z - totals[2] / totals[1]
        kept = logits if len(chunks) == 1 else None
        ctx.save_for_backward(hidden, weight, kept, top, log_z, entropy, index, inside)
        ctx.main_grad = getattr(weight, "main_grad", None)
        ctx.chunks, ctx.real, ctx.temperature, ctx.group = chunks, real, temperature, group
        return totals[0] - log_z, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, kept, *per_row = ctx.saved_tensors
        per_row += grads
        mine = weight[: ctx.real]
        grad_hidden = torch.zeros_like(hidden)
        # Chunks add up in float32, like the micro-batches of a step: where Megatron accumulates those, if
        # there is such a place (its hook on the parameter then finds nothing left to add).
        learns, main_grad = ctx.needs_input_grad[1], ctx.main_grad
        own = torch.zeros_like(weight, dtype=torch.float32) if learns and main_grad is None else None
        total: Any = main_grad if own is None else own
        reductions: list[Any] = []
        for rows in ctx.chunks:
            logits = hidden[rows] @ mine.t() if kept is None else kept
            parts = [
                fused.on(logits.device, _gradient)(
                    logits[some], *(values[part] for values in per_row), ctx.temperature
                )
                for some, part in _kernels(logits, rows.start)
            ]
            del logits
            grad = parts[0] if len(parts) == 1 else torch.cat(parts)
            del parts
            grad_hidden[rows] = grad @ mine
            # On its way while the weight's gradient is computed.
            reductions.append(dist.all_reduce(grad_hidden[rows], group=ctx.group, async_op=True))
            if learns:
                _add_product(total[: ctx.real], grad.t(), hidden[rows])
        for reduction in reductions:
            reduction.wait()
        return grad_hidden, None if own is None else own.to(weight.dtype), None, None, None, None


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


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total`` (float32) += a @ b."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _chunks(rows: int, width: int, logits: int) -> Iterator[slice]:
    """Slices of ``rows`` rows of ``width`` logits with about ``logits`` logits each."""
    step = max(1, logits // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _kernels(logits: torch.Tensor, first: int) -> Iterator[tuple[slice, slice]]:
    """Rows that are worked on together, in ``logits`` and, where those begin at ``first``, in the whole:
    all of them on a GPU, whose fused kernels keep nothing of them.
    """
    for rows in _chunks(len(logits), logits.size(-1), logits.numel() if logits.is_cuda else CHUNK):
        yield rows, slice(first + rows.start, first + rows.stop)


def logprob_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    vocab_size: int,
    group: dist.ProcessGroup,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of ``target`` and entropy under softmax(hidden @ weightᵀ / temperature), ``[M]``
    float32 nats.

    ``hidden`` ``[M, h]``, the same on every rank of ``group``, of any floating dtype; ``weight``
    ``[V/tp, h]`` is this rank's contiguous share of the (padded) vocabulary; ``target`` ``[M]`` int64 holds
    global token ids below ``vocab_size``.  Columns from ``vocab_size`` on are padding and get probability
    zero.  Logits are rounded to their dtype once, and divided in float32.

    Collective; every rank receives the same result.  Backward, the gradient of ``hidden`` is summed over the
    ranks; that of ``weight`` goes straight into ``weight.main_grad`` (float32) where there is one.
    """
    out = _ScoredProjection.apply(hidden, weight, target, vocab_size, temperature, group)
    assert isinstance(out, tuple)
    return out
