"""The decoder: one forward pass over a packed batch of decoding rows and new prompts, in plain torch.

All tokens of a step stand in one packed axis of length T, so the matrix products see no padding.  Only
attention looks at rows: it runs once per :class:`Segment`, a contiguous range of KV rows whose queries have
similar widths (decoding rows have width 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from system.engine.embedded.shape import ModelShape
from system.engine.embedded.weights import LayerWeights, Weights


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries of rows ``first_row .. first_row + rows`` at packed positions ``start .. stop``."""

    start: int
    stop: int
    first_row: int
    rows: int
    width: int  # queries per row, padded to the longest
    keys: int  # context length to attend over
    scatter: (
        Tensor | None
    )  # [stop - start] place of each packed token in the padded [rows·width]; None: no padding
    mask: Tensor  # [rows, 1, width, keys] additive, 0 or -inf


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass.  T packed tokens, N rows that want logits."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    places: Tensor  # [T] int64: row · context + position, where this token's key and value are written
    segments: tuple[Segment, ...]
    last: Tensor | None  # [N] packed index of each row's last token; None: every token is one (pure decoding)


class KVStore:
    """Keys and values of every slot: ``[2, layers, slots, context, kv_heads, head_dim]``.

    Zero-filled, because masked-out garbage must stay finite; the operating system backs pages only once
    touched.
    """

    def __init__(self, shape: ModelShape, slots: int, context: int, dtype: torch.dtype, device: torch.device):
        self.data = torch.zeros(
            2, shape.layers, slots, context, shape.kv_heads, shape.head_dim, dtype=dtype, device=device
        )

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """Copy context positions ``start .. stop`` of one slot to another, all layers at once."""
        if stop > start:
            self.data[:, :, target, start:stop] = self.data[:, :, source, start:stop]


class Decoder:
    """Computes; holds no weights of its own, so that a swap is one assignment between two steps."""

    def __init__(self, shape: ModelShape, context: int, dtype: torch.dtype, device: torch.device):
        self.shape = shape
        half = shape.head_dim // 2
        # Angles in float32, as the Hugging Face model computes them: at position 1000 its rounding is
        # visible.
        frequency = 1.0 / shape.rope_theta ** (torch.arange(half, dtype=torch.float32) / half)
        angle = torch.arange(context, dtype=torch.float32)[:, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        # rotate_half(x)·sin == roll(x, D/2)·[-sin, sin]: the sign lives in the table, not in the step.
        self._cos = torch.cat([cos, cos], -1)[:, None].to(device, dtype)  # [context, 1, D]
        self._sin = torch.cat([-sin, sin], -1)[:, None].to(device, dtype)

    def forward(self, weights: Weights, kv: KVStore, batch: Batch) -> Tensor:
        """Write the batch's keys and values and return logits ``[N, V]`` in float32."""
        eps = self.shape.eps
        cos = self._cos.index_select(0, batch.positions)
        sin = self._sin.index_select(0, batch.positions)
        x = F.embedding(batch.tokens, weights.embed)
        for index, layer in enumerate(weights.layers):
            x = x + self._attention(layer, kv.data[0, index], kv.data[1, index], batch, x, cos, sin)
            gate_up = F.linear(rms_norm(x, layer.ffn_norm, eps), layer.gate_up)
            gate, up = gate_up.chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        if batch.last is not None:
            x = x.index_select(0, batch.last)
        return F.linear(rms_norm(x, weights.norm, eps), weights.head).float()

    def _attention(
        self,
        layer: LayerWeights,
        keys: Tensor,
        values: Tensor,
        batch: Batch,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        shape = self.shape
        heads, groups, size = shape.heads, shape.kv_heads, shape.head_dim
        normed = rms_norm(x, layer.attention_norm, shape.eps)
        qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(-1, heads + 2 * groups, size)
        qk = qkv[:, : heads + groups]
        if layer.qk_norm is not None:
            qk = rms_norm(qk, layer.qk_norm, shape.eps)
        qk = torch.addcmul(qk * cos, qk.roll(size // 2, -1), sin)
        keys.view(-1, groups, size).index_copy_(0, batch.places, qk[:, heads:])
        values.view(-1, groups, size).index_copy_(0, batch.places, qkv[:, heads + groups :])
        parts = [
            self._attend(segment, qk[segment.start : segment.stop, :heads], keys, values)
            for segment in batch.segments
        ]
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
        return F.linear(mixed, layer.out, layer.out_bias)

    def _attend(self, segment: Segment, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q ``[stop - start, H, D]`` -> ``[stop - start, H·D]``."""
        heads, groups, size = self.shape.heads, self.shape.kv_heads, self.shape.head_dim
        rows, width = segment.rows, segment.width
        span = slice(segment.first_row, segment.first_row + rows)
        k = keys[span, : segment.keys].transpose(1, 2)  # [rows, G, keys, D]
        v = values[span, : segment.keys].transpose(1, 2)
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
    Qwen).
    """
    return F.rms_norm(x, (x.shape[-1],), None, eps) * scale
