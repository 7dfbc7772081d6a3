"""Where every piece of a Megatron parameter lies among the Hugging Face tensors.

One map serves loading, exporting and checkpoints, and makes all three independent of the parallel layout: a
tensor-parallel shard is a list of :class:`RowBlock`, consecutive rows, each a box in one Hugging Face tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from system.learn.model import TreeGPTModel, padded_vocab_size
from system.models.adapter import Adapter, factors
from system.models.shape import ModelShape

Split = Literal["replicated", "query-groups", "columns", "gate-up", "vocabulary"]

# Megatron name within a layer -> (how it is split over tensor-parallel ranks, the parts that it is made of).
_LAYER: dict[str, tuple[Split, tuple[str, ...]]] = {
    "input_layernorm.weight": ("replicated", ("attention_norm",)),
    "self_attention.linear_qkv.weight": ("query-groups", ("q", "k", "v")),
    "self_attention.linear_qkv.bias": ("query-groups", ("q_bias", "k_bias", "v_bias")),
    "self_attention.linear_proj.weight": ("columns", ("out",)),
    "self_attention.q_layernorm.weight": ("replicated", ("q_norm",)),
    "self_attention.k_layernorm.weight": ("replicated", ("k_norm",)),
    "pre_mlp_layernorm.weight": ("replicated", ("mlp_norm",)),
    "mlp.linear_fc1.weight": ("gate-up", ("gate", "up")),
    "mlp.linear_fc2.weight": ("columns", ("down",)),
}
_TOP: dict[str, tuple[Split, str]] = {
    "embedding.word_embeddings.weight": ("vocabulary", "embedding"),
    "decoder.final_layernorm.weight": ("replicated", "norm"),
    "output_layer.weight": ("vocabulary", "head"),
}


# What of a layer's adapters is split, and how: the factors of a layer that is split by rows or by columns.
_ADAPTER: dict[tuple[bool, str], Split] = {
    (False, "A"): "replicated", (False, "B"): "gate-up", (True, "A"): "columns", (True, "B"): "replicated",
}  # fmt: skip


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of one rank's parameter, and the box of a Hugging Face tensor that they are."""

    start: int  # first row in the parameter
    rows: int
    name: str  # Hugging Face tensor
    row: int  # first row in it
    column: int = 0  # first column in it; the box is as wide as the parameter

    def box(self, shard: torch.Tensor) -> tuple[slice, ...]:
        """The box, as an index of the tensor; ``shard`` is the parameter."""
        rows = slice(self.row, self.row + self.rows)
        return (rows,) if shard.dim() == 1 else (rows, slice(self.column, self.column + shard.size(1)))


@dataclass(frozen=True)
class MappedParameter:
    """One Megatron parameter among the Hugging Face tensors."""

    stage: int  # pipeline stage that owns it
    key: str  # name on its stage
    split: Split
    shapes: dict[str, tuple[int, ...]]  # full shapes of the Hugging Face tensors it is made of

    @property
    def replicated(self) -> bool:
        return self.split == "replicated"

    @property
    def numel(self) -> int:
        """Elements of its Hugging Face tensors together."""
        return sum(math.prod(shape) for shape in self.shapes.values())


class WeightMap:
    """The parameters of one model.  Equal on all ranks: it is made from the configuration alone."""

    @staticmethod
    def of(model: TreeGPTModel) -> WeightMap:
        config = model.config
        tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
        return WeightMap(model.shape, tp, pp, model.adapter)

    def __init__(self, shape: ModelShape, tp: int, pp: int, adapter: Adapter | None = None) -> None:
        self.tp, self.pp, self.tied = tp, pp, shape.tied
        self._shape, self._layers, self._groups = shape, shape.layers, shape.kv_heads
        self._shapes = shape.tensors()
        self._adapter = adapter

    def parameters(self) -> list[MappedParameter]:
        """Every parameter of the model once, from the embedding to the head, stage by stage."""
        top = list(_TOP)
        names = [(0, top[0])]
        per_stage = self._layers // self.pp
        for layer in range(self._layers):
            stage, local = divmod(layer, per_stage)
            names += [
                (stage, f"decoder.layers.{local}.{suffix}")
                for suffix, (_, parts) in _LAYER.items()
                if parts[0] in self._shape.layer_parts
            ]
        names += [(self.pp - 1, name) for name in (top[1:2] if self.tied else top[1:])]
        return [self.parameter(stage, name) for stage, name in names]

    def adapters(self) -> list[MappedParameter]:
        """Every adapter of the model once, stage by stage."""
        if self._adapter is None:
            return []
        per_stage = self._layers // self.pp
        return [
            self.parameter(
                layer // per_stage, f"decoder.layers.{layer % per_stage}.{module}.lora.{factor}.{part}"
            )
            for layer in range(self._layers)
            for suffix, (_, parts) in _LAYER.items()
            if (module := suffix.removesuffix(".weight")) != suffix
            for part in parts
            if part in self._adapter.parts
            for factor in "AB"
        ]

    def is_copy(self, key: str) -> bool:
        """Whether a parameter is the tied head of a last stage that is not the first: the embedding again."""
        return self.tied and key == "output_layer.weight"

    def parameter(self, stage: int, key: str) -> MappedParameter:
        """Where a stage's parameter comes from."""
        if key in _TOP:
            split, part = _TOP["embedding.word_embeddings.weight" if self.is_copy(key) else key]
            names = (self._shape.tensor(part),)
        else:
            _decoder, _layers, local, suffix = key.split(".", 3)
            layer = stage * (self._layers // self.pp) + int(local)
            module, _, adapter = suffix.partition(".lora.")
            if adapter:
                return self._adapter_parameter(stage, key, layer, module, *adapter.split("."))
            split, parts = _LAYER[suffix]
            names = tuple(self._shape.tensor(part, layer) for part in parts)
        return MappedParameter(stage, key, split, {name: self._shapes[name] for name in names})

    def _adapter_parameter(
        self, stage: int, key: str, layer: int, module: str, factor: str, part: str
    ) -> MappedParameter:
        assert self._adapter is not None, key
        name = factors(self._shape.tensor(part, layer))["AB".index(factor)]
        wide, narrow = self._shape.layer_parts[part]
        size = (self._adapter.rank, narrow) if factor == "A" else (wide, self._adapter.rank)
        by_columns = _LAYER[f"{module}.weight"][0] == "columns"
        return MappedParameter(stage, key, _ADAPTER[by_columns, factor], {name: size})

    def blocks(self, mapped: MappedParameter, rank: int) -> list[RowBlock]:
        """The boxes that tensor-parallel rank ``rank`` holds of a parameter, in its row order.

        Rows of the parameter beyond the last block pad the vocabulary and lie in no tensor.
        """
        names = list(mapped.shapes)
        first = names[0]
        full = mapped.shapes[first]
        match mapped.split:
            case "replicated":
                return [RowBlock(0, full[0], first, 0)]
            case "columns":
                return [RowBlock(0, full[0], first, 0, rank * (full[1] // self.tp))]
            case "vocabulary":
                share = padded_vocab_size(full[0], self.tp) // self.tp
                rows = min(share, full[0] - rank * share)
                return [RowBlock(0, rows, first, rank * share)] if rows > 0 else []
            case "gate-up":
                share = full[0] // self.tp
                return [RowBlock(i * share, share, name, rank * share) for i, name in enumerate(names)]
            case "query-groups":
                # Megatron interleaves: for each query group its queries, its key and its value.
                sizes = [mapped.shapes[name][0] // self._groups for name in names]
                here = self._groups // self.tp
                return [
                    RowBlock(
                        local * sum(sizes) + sum(sizes[:i]), sizes[i], name, (rank * here + local) * sizes[i]
                    )
                    for local in range(here)
                    for i, name in enumerate(names)
                ]

    def shard_shape(self, mapped: MappedParameter) -> tuple[int, ...]:
        """Shape of one rank's parameter."""
        rows = sum(
            block.rows for block in self.blocks(mapped, 0)
        )  # only the last ranks' vocabulary is padded
        _, *width = next(iter(mapped.shapes.values()))
        return (rows, *(n // self.tp if mapped.split == "columns" else n for n in width))
