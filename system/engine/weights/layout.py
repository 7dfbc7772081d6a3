"""Which part of each Hugging Face tensor an SGLang rank holds, and under which name.

SGLang fuses the q, k and v projections into ``qkv_proj`` and gate and up into ``gate_up_proj``, and splits
what can be split over its tensor-parallel ranks, and stacks the experts of a layer, each split likewise; its
weight checker digests exactly these fused shards.  Follows ``load_weights`` of SGLang 0.5 (``llama.py``,
``qwen2.py``, ``qwen3.py``, ``qwen3_moe.py`` of its ``models``), ``QKVParallelLinear``,
``VocabParallelEmbedding``, ``UnquantizedFusedMoEMethod`` and, for what a CPU pads,
``configs/update_config.py``.
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
        if shape.heads % tp:
            raise ShardError(f"{shape.heads} heads cannot be split over {tp} tensor-parallel ranks")
        copies = tp % shape.kv_heads == 0 and device == "cuda"  # more ranks than key/value heads
        if shape.kv_heads % tp and not copies:
            raise ShardError(f"{shape.kv_heads} key/value heads cannot be split over {tp} ranks on {device}")
        self._shape, self._tp = shape, tp
        multiple = tp * CPU_FFN_PADDING if device == "cpu" else tp
        for name, size in shape.divided().items():
            if device != "cpu" and "ffn" in name and size % tp:
                raise ShardError(f"a feed-forward size of {size} cannot be split over {tp} ranks")
        self._ffn_rows = _round_up(shape.ffn, multiple) // tp
        self._expert_rows = _round_up(shape.experts.ffn, multiple) // tp if shape.experts else 0
        self._parts: dict[str, dict[str, Tensor]] = {}

    def add(self, name: str, tensor: Tensor) -> Iterator[tuple[str, list[Tensor]]]:
        """SGLang's parameters that ``tensor`` completes: (name, one shard per rank)."""
        module = name.split(".")[-2]
        if ".experts." in name:
            yield from self._add_expert(name, module, tensor)
            return
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

    def _add_expert(self, name: str, module: str, tensor: Tensor) -> Iterator[tuple[str, list[Tensor]]]:
        """All experts of a layer stand in two tensors, ``w13`` (gate and up) and ``w2`` (down)."""
        layer, _, expert = name.partition(".experts.")
        down = module == "down_proj"
        whole = f"{layer}.experts.{'w2' if down else 'w13'}_weight"
        parts = self._parts.setdefault(whole, {})
        parts[expert] = tensor
        count = self._shape.experts.count if self._shape.experts else 0
        if len(parts) < (1 if down else 2) * count:
            return
        del self._parts[whole]

        def of(expert: int, module: str, rank: int) -> Tensor:
            part = parts[f"{expert}.{module}.weight"]
            if down:
                return _padded_rows(part.t(), self._expert_rows, rank).t()
            return _padded_rows(part, self._expert_rows, rank)

        modules = ("down_proj",) if down else ("gate_proj", "up_proj")
        yield (
            whole,
            [
                torch.stack([torch.cat([of(e, m, rank) for m in modules]) for e in range(count)])
                for rank in range(self._tp)
            ],
        )

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
