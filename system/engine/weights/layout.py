"""Which part of each Hugging Face tensor an SGLang rank holds, and under which name.

SGLang fuses the q, k and v projections into ``qkv_proj`` and gate and up into ``gate_up_proj``, and splits
what can be split over its tensor-parallel ranks; its weight checker digests exactly these fused shards.
Follows ``load_weights`` of SGLang 0.5 (``models/llama.py``, ``models/qwen2.py``, ``models/qwen3.py``),
``QKVParallelLinear``, ``VocabParallelEmbedding`` and, for what a CPU pads, ``configs/update_config.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from system.errors import EspalierError
from system.models.shape import ModelShape

_FUSED = {
    part: (fused, parts)
    for fused, parts in (
        ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
        ("gate_up_proj", ("gate_proj", "up_proj")),
    )
    for part in parts
}
VOCABULARY_PADDING = 64  # rows of the embedding and of the output head are padded to a multiple of this
CPU_FFN_PADDING = 32  # on a CPU, each rank's share of the feed-forward size is padded to a multiple of this


class ShardError(EspalierError, ValueError):
    """The model cannot be split over so many tensor-parallel ranks."""


class Fuser:
    """Takes Hugging Face tensors in any order and hands out SGLang's parameters as soon as they are whole."""

    def __init__(self, shape: ModelShape, tp: int, device: str) -> None:
        """``device``: "cpu" or "cuda".  Raises :class:`ShardError` for a split whose layout is not known."""
        if shape.experts:
            raise ShardError(f"{shape.family.title}: where SGLang keeps experts is not known here yet")
        if shape.heads % tp:
            raise ShardError(f"{shape.heads} heads cannot be split over {tp} tensor-parallel ranks")
        copies = tp % shape.kv_heads == 0 and device == "cuda"  # more ranks than key/value heads
        if shape.kv_heads % tp and not copies:
            raise ShardError(f"{shape.kv_heads} key/value heads cannot be split over {tp} ranks on {device}")
        self._shape, self._tp = shape, tp
        self._ffn_rows = _round_up(shape.ffn, tp * CPU_FFN_PADDING if device == "cpu" else tp) // tp
        if device != "cpu" and shape.ffn % tp:
            raise ShardError(f"a feed-forward size of {shape.ffn} cannot be split over {tp} ranks")
        self._parts: dict[str, dict[str, Tensor]] = {}

    def add(self, name: str, tensor: Tensor) -> Iterator[tuple[str, list[Tensor]]]:
        """SGLang's parameters that ``tensor`` completes: (name, one shard per rank)."""
        module = name.split(".")[-2]
        if module not in _FUSED:
            yield name, [self._shard(name, tensor, rank) for rank in range(self._tp)]
            return
        fused, order = _FUSED[module]
        whole = name.replace(f".{module}.", f".{fused}.")
        parts = self._parts.setdefault(whole, {})
        parts[module] = tensor
        if len(parts) == len(order):
            del self._parts[whole]
            yield whole, [torch.cat(self._rows(parts, order, rank)) for rank in range(self._tp)]

    def _rows(self, parts: Mapping[str, Tensor], order: tuple[str, ...], rank: int) -> list[Tensor]:
        """One rank's rows of each fused projection."""
        if order[0] == "gate_proj":
            return [_padded_rows(parts[module], self._ffn_rows, rank) for module in order]
        kv = min(self._tp, self._shape.kv_heads)  # ranks beyond the number of key/value heads hold copies
        shares = {"q_proj": (self._tp, rank)} | dict.fromkeys(
            ("k_proj", "v_proj"), (kv, rank * kv // self._tp)
        )
        return [parts[module].chunk(shares[module][0])[shares[module][1]] for module in order]

    def _shard(self, name: str, tensor: Tensor, rank: int) -> Tensor:
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            multiple = VOCABULARY_PADDING
            if _round_up(self._shape.vocab, multiple) % self._tp:
                multiple *= self._tp
            return _padded_rows(tensor, _round_up(self._shape.vocab, multiple) // self._tp, rank)
        if name.endswith("o_proj.weight"):
            return tensor.chunk(self._tp, 1)[rank].contiguous()
        if name.endswith("down_proj.weight"):
            return _padded_rows(tensor.t(), self._ffn_rows, rank).t().contiguous()
        return tensor


def _padded_rows(tensor: Tensor, rows: int, rank: int) -> Tensor:
    """[rows, …] the rank's slice, with zeros where the tensor has ended."""
    mine = tensor[rank * rows : (rank + 1) * rows]
    return torch.cat([mine, mine.new_zeros(rows - mine.shape[0], *mine.shape[1:])])


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
