"""The decoder: one forward pass over a packed batch of decoding rows and new prompts, in plain torch.

All tokens of a step stand in one packed axis of length T, so the matrix products see no padding.  Only
attention looks at rows: it runs once per :class:`KVSegment`, a contiguous range of KV rows whose queries have
similar widths (decoding rows have width 1).
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from system.engine.embedded.adapters import Factors, Layers
from system.engine.embedded.experts import choose, mixture
from system.engine.embedded.weights import LayerWeights, Weights
from system.models.rope import turns
from system.models.shape import ModelShape
from system.tree.routes import Routes, route_type

_SCORED = 256  # rows whose logits over the whole vocabulary are held at one time, to score given tokens


@dataclass(frozen=True, slots=True)
class KVSegment:
    """Queries of rows ``first_row .. first_row + rows`` at packed positions ``start .. stop``."""

    start: int
    stop: int
    first_row: int
    rows: int
    width: int  # queries per row, padded to the longest
    keys: int  # context length to attend over
    # [stop - start] each packed token's place in the padded [rows·width]; None: no padding
    scatter: Tensor | None
    mask: Tensor  # [rows, 1, width, keys] additive, 0 or -inf


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass.  T packed tokens, N rows that want logits."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    places: Tensor  # [T] int64: row · context + position
    heads: Tensor  # [T · 2 · kv_heads] int64: where the token's keys and values are written (KVStore.layers)
    segments: tuple[KVSegment, ...]
    last: Tensor | None  # [N] packed index of each row's last token; None: every token is one (pure decoding)
    adapted: Tensor | None = None  # [T, K] each token's adapters (AdapterStack.mask); None: there are none

    def of_last(self, hidden: Tensor) -> Tensor:
        """[N, E] of [T, E]: each row's last token."""
        return hidden if self.last is None else hidden.index_select(0, self.last)


class KVStore:
    """Keys and values of every slot: ``[layers, slots, 2 · kv_heads, context, head_dim]``, the key heads
    first; and the experts that computed them.

    Zero-filled, because masked-out garbage must stay finite.
    """

    def __init__(self, shape: ModelShape, slots: int, context: int, dtype: torch.dtype, device: torch.device):
        groups, size = shape.kv_heads, shape.head_dim
        self.data = lazy_zeros((shape.layers, slots, 2 * groups, context, size), dtype, device)
        # Per layer, for writing: every place of every head of every slot in one axis.
        self.layers = [layer.view(-1, size) for layer in self.data]
        # Of sparse layers the experts that each token chose: what its keys and values behind them came from.
        kept = shape.experts
        sparse, chosen = (kept.layers, kept.chosen) if kept else (0, 0)
        few = torch.uint8 if kept and route_type(kept.count) is np.uint8 else torch.int16
        self._routes = torch.zeros((sparse, slots, context, chosen), dtype=few, device=device)
        self.routes = [layer.view(-1, chosen) for layer in self._routes]
        self._strides = self.data.stride()[1:]

    def context(self, layer: int, first_row: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[rows, kv_heads, length, head_dim]`` for reading (views)."""
        _, slots, heads, _, size = self.data.shape
        slot, head = self._strides[:2]
        groups, start = heads // 2, (layer * slots + first_row) * slot
        shape = (rows, groups, length, size)
        return (
            self.data.as_strided(shape, self._strides, start),
            self.data.as_strided(shape, self._strides, start + groups * head),
        )

    def move(self, sources: NDArray[np.int64], targets: NDArray[np.int64], stop: int) -> None:
        """Permute slots up to position ``stop``: what slot ``sources[i]`` held, ``targets[i]`` holds."""
        index = torch.from_numpy(np.stack([sources, targets])).to(self.data.device)
        for held in (self.data[:, :, :, :stop], self._routes[:, :, :stop]):
            held.index_copy_(1, index[1], held.index_select(1, index[0]))

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """Copy context positions ``start .. stop`` of one slot to another, all layers at once."""
        if stop > start:
            self.data[:, target, :, start:stop] = self.data[:, source, :, start:stop]
            if self.routes:
                self._routes[:, target, start:stop] = self._routes[:, source, start:stop]

    def routes_of(self, slot: int, start: int, stop: int) -> Routes:
        """``[stop - start, sparse layers, k]`` the experts of positions ``start .. stop`` of a slot, on the
        host.
        """
        found = self._routes[:, slot, start:stop].transpose(0, 1).cpu().numpy()
        return found.astype(np.uint8 if found.dtype == np.uint8 else np.uint16)  # a copy: the slot is reused


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that cost memory only where they are touched; on the CPU in huge pages where the system has them.

    Every decoding step walks through all running rows' keys and values, far more 4 KiB pages than the
    processor's address cache holds.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if device.type != "cpu" or advice is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    with contextlib.suppress(OSError):  # a kernel without transparent huge pages
        memory.madvise(advice)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@dataclass(frozen=True, slots=True)
class _Projections:
    """The matrix products of one layer, with its adapters if it has some."""

    adapters: Mapping[str, Factors]
    mask: Tensor | None

    def __call__(self, field: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product = F.linear(x, weight, bias)
        if self.mask is None or field not in self.adapters:
            return product
        return self.adapters[field].add(x, product, self.mask)


class Decoder:
    """Computes; holds no weights of its own, so that a swap is one assignment between two steps."""

    def __init__(self, shape: ModelShape, context: int, dtype: torch.dtype, device: torch.device):
        self.shape = shape
        cos, sin = turns(shape.rope.frequencies(shape.head_dim), shape.rope.scale, torch.arange(context))
        # rotate_half(x)·sin == roll(x, D/2)·[-sin, sin]: the sign lives in the table, not in the step.
        self._cos = torch.cat([cos, cos], -1)[:, None].to(device, dtype)  # [context, 1, D]
        self._sin = torch.cat([-sin, sin], -1)[:, None].to(device, dtype)

    def forward(self, weights: Weights, kv: KVStore, batch: Batch, adapters: Layers = ()) -> Tensor:
        """Write the batch's keys and values and return the hidden states ``[T, E]`` behind the last layer.

        ``adapters``: of the versions that ``batch.adapted`` speaks of.
        """
        eps = self.shape.eps
        cos = self._cos.index_select(0, batch.positions)
        sin = self._sin.index_select(0, batch.positions)
        x = F.embedding(batch.tokens, weights.embed)
        routes = iter(kv.routes)
        for index, layer in enumerate(weights.layers):
            own = _Projections(adapters[index] if adapters else {}, batch.adapted)
            x += self._attention(index, layer, own, kv, batch, x, cos, sin)
            normed = rms_norm(x, layer.ffn_norm, eps)
            if layer.router is not None and self.shape.experts is not None:
                choice, weight = choose(normed, layer.router, self.shape.experts)
                record = next(routes)
                record.index_copy_(0, batch.places, choice.to(record.dtype))
                x += mixture(normed, choice, weight, layer.gate_up, layer.down)
            else:
                gate, up = own("gate_up", normed, layer.gate_up).chunk(2, -1)
                x += own("down", F.silu(gate).mul_(up), layer.down)
        return x

    def logits(self, weights: Weights, hidden: Tensor) -> Tensor:
        """``[N, V]`` in float32 of hidden states ``[N, E]``."""
        return F.linear(rms_norm(hidden, weights.norm, self.shape.eps), weights.head).float()

    def scores(self, weights: Weights, hidden: Tensor, target: Tensor, temperature: float) -> list[float]:
        """The log-probability of each of ``target`` ``[n]`` where ``hidden`` ``[n, E]`` predict it."""
        found: list[float] = []
        for states, tokens in zip(hidden.split(_SCORED), target.split(_SCORED), strict=True):
            scaled = self.logits(weights, states) / (
                temperature or 1.0
            )  # of greedy rows at 1, as sampling does
            own = scaled.gather(1, tokens[:, None])[:, 0]
            found += (own - scaled.logsumexp(-1)).tolist()
        return found

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        own: _Projections,
        kv: KVStore,
        batch: Batch,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        shape = self.shape
        heads, groups, size = shape.heads, shape.kv_heads, shape.head_dim
        normed = rms_norm(x, layer.attention_norm, shape.eps)
        qkv = own("qkv", normed, layer.qkv, layer.qkv_bias).view(-1, heads + 2 * groups, size)
        qk = qkv[:, : heads + groups]
        if layer.qk_norm is not None:
            qk = rms_norm(qk, layer.qk_norm, shape.eps)
        # Not addcmul: in bfloat16 the Hugging Face model rounds both products before it adds them.
        torch.add(qk * cos, qk.roll(size // 2, -1) * sin, out=qkv[:, : heads + groups])
        kv.layers[index].index_copy_(0, batch.heads, qkv[:, heads:].reshape(-1, size))
        q = qkv[:, :heads]
        parts = [
            self._attend(
                segment,
                q[segment.start : segment.stop],
                *kv.context(index, segment.first_row, segment.rows, segment.keys),
            )
            for segment in batch.segments
        ]
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
        return own("out", mixed, layer.out)

    def _attend(self, segment: KVSegment, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q ``[stop - start, H, D]``, k and v ``[rows, G, keys, D]`` -> ``[stop - start, H·D]``."""
        heads, groups, size = self.shape.heads, self.shape.kv_heads, self.shape.head_dim
        rows, width = segment.rows, segment.width
        if width == 1:
            # Grouped queries share their key head: fold the group into the query axis, no key is repeated.
            q = q.reshape(rows, groups, heads // groups, size)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=segment.mask).reshape(rows, heads * size)
        if segment.scatter is not None:
            padded = q.new_zeros(rows * width, heads, size)
            q = padded.index_copy_(0, segment.scatter, q)
        q = q.reshape(rows, width, heads, size).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=segment.mask, enable_gqa=heads != groups)
        mixed = mixed.transpose(1, 2).reshape(rows * width, heads * size)
        return mixed if segment.scatter is None else mixed.index_select(0, segment.scatter)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + ε), rounded to x's dtype, then times ``scale`` (Zhang & Sennrich 2019; rounding as in
    Hugging Face's models).
    """
    return F.rms_norm(x, (x.shape[-1],), None, eps) * scale
