"""Where every piece of a Megatron parameter lies among the Hugging Face tensors.

One map serves loading, exporting and checkpoints, and makes all three independent of the parallel layout: a
tensor-parallel shard is a list of :class:`RowBlock`, consecutive rows, each a box in one Hugging Face tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import torch

from system.learn.model import TreeGPTModel, padded_vocab_size
from system.models.adapter import Adapter, factors
from system.models.shape import ModelShape

Split = Literal[
    "replicated", "query-groups", "columns", "gate-up", "vocabulary", "experts-gate-up", "experts-columns"
]

# Megatron name within a layer -> (how it is split over ranks, the parts that it is made of: the experts' of
# each of them).
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
    "mlp.router.weight": ("replicated", ("router",)),
    "mlp.experts.fc1": ("experts-gate-up", ("expert_gate", "expert_up")),
    "mlp.experts.fc2": ("experts-columns", ("expert_down",)),
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
    experts: range = range(0)  # those that the tensors are of, equally many of each

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
        return WeightMap(model.shape, tp, pp, config.expert_model_parallel_size, model.adapter)

    def __init__(
        self, shape: ModelShape, tp: int, pp: int, ep: int = 1, adapter: Adapter | None = None
    ) -> None:
        self.tp, self.pp, self.ep, self.tied = tp, pp, ep, shape.tied
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
                if parts[0] in self._parts(layer)
            ]
        names += [(self.pp - 1, name) for name in (top[1:2] if self.tied else top[1:])]
        return [self.parameter(stage, name) for stage, name in names]

    def pieces(self) -> Iterator[MappedParameter]:
        """The same, but of the experts each by itself: all of a layer's are too much at one time."""
        for mapped in self.parameters():
            if not mapped.experts:
                yield mapped
            for expert in mapped.experts:
                of_each = len(mapped.shapes) // len(mapped.experts)
                names = islice(mapped.shapes.items(), expert * of_each, (expert + 1) * of_each)
                yield replace(mapped, shapes=dict(names), experts=range(expert, expert + 1))

    def _parts(self, layer: int) -> set[str]:
        experts = self._shape.expert_parts if self._shape.sparse(layer) else {}
        return {*self._shape.layer_parts(layer), *experts}

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
        experts = range(0)
        if key in _TOP:
            split, part = _TOP["embedding.word_embeddings.weight" if self.is_copy(key) else key]
            names = [self._shape.tensor(part)]
        else:
            _decoder, _layers, local, suffix = key.split(".", 3)
            layer = stage * (self._layers // self.pp) + int(local)
            module, _, adapter = suffix.partition(".lora.")
            if adapter:
                return self._adapter_parameter(stage, key, layer, module, *adapter.split("."))
            split, parts = _LAYER[suffix]
            if self._shape.experts and parts[0] in self._shape.expert_parts:
                experts = range(self._shape.experts.count)
            of = experts or (None,)
            names = [self._shape.tensor(part, layer, expert) for expert in of for part in parts]
        return MappedParameter(stage, key, split, {name: self._shapes[name] for name in names}, experts)

    def holders(self, mapped: MappedParameter) -> list[int]:
        """Which tensor-parallel ranks hold a share of a parameter, or of experts which parts of them."""
        if mapped.replicated:
            return [0]
        if not mapped.experts or self.ep == 1:
            return list(range(self.tp))
        return sorted({expert // self._experts_here for expert in mapped.experts})

    @property
    def _experts_here(self) -> int:
        """Experts that a rank holds of a layer."""
        return self._shape.experts.count // self.ep if self._shape.experts else 0

    def _adapter_parameter(
        self, stage: int, key: str, layer: int, module: str, factor: str, part: str
    ) -> MappedParameter:
        assert self._adapter is not None, key
        name = factors(self._shape.tensor(part, layer))["AB".index(factor)]
        wide, narrow = self._shape.layer_parts(0)[part]
        size = (self._adapter.rank, narrow) if factor == "A" else (wide, self._adapter.rank)
        by_columns = _LAYER[f"{module}.weight"][0] == "columns"
        return MappedParameter(stage, key, _ADAPTER[by_columns, factor], {name: size})

    def blocks(self, mapped: MappedParameter, rank: int) -> list[RowBlock]:
        """The boxes that tensor-parallel rank ``rank`` holds of a parameter, in its row order; of experts
        under expert parallelism those of part ``rank``.

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
            case "experts-gate-up" | "experts-columns":
                return self._expert_blocks(mapped, rank)

    def _expert_blocks(self, mapped: MappedParameter, rank: int) -> list[RowBlock]:
        """Of the experts that a rank holds whole (``ep``), or of its share of every expert."""
        names, each = list(mapped.shapes), len(mapped.shapes) // len(mapped.experts)
        part, share = (rank, 0) if self.ep > 1 else (0, rank)
        blocks: list[RowBlock] = []
        for number, expert in enumerate(mapped.experts):
            local = expert - part * self._experts_here
            if 0 <= local < self._experts_here:
                for i, name in enumerate(names[number * each : (number + 1) * each]):
                    rows, columns = mapped.shapes[name]
                    row = column = 0
                    if mapped.split == "experts-columns":
                        column = share * (columns // self._expert_shares)
                    else:
                        rows //= self._expert_shares
                        row = share * rows
                    blocks.append(RowBlock((local * each + i) * rows, rows, name, row, column))
        return blocks

    @property
    def _expert_shares(self) -> int:
        """Ranks that an expert is split over."""
        return self.tp if self.ep == 1 else 1

    def shard_shape(self, mapped: MappedParameter) -> tuple[int, ...]:
        """Shape of one rank's parameter, or piece of it."""
        # Only the last ranks' vocabulary is padded.
        rows = sum(block.rows for block in self.blocks(mapped, self.holders(mapped)[0]))
        _, *width = next(iter(mapped.shapes.values()))
        shares = {"columns": self.tp, "experts-columns": self._expert_shares}.get(mapped.split, 1)
        return (rows, *(n // shares for n in width))
