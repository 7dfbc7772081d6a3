"""LoRA on Megatron's parallel layers: the model's own weights stand still, adapters beside them learn.

A layer that is split by rows (``linear_qkv``, ``linear_fc1``) has A whole on every tensor-parallel rank and B
split like itself; one that is split by columns (``linear_proj``, ``linear_fc2``) has A split and B whole.  So
only activations of the adapters' rank are exchanged in addition.  Each Hugging Face projection has an (A, B)
of its own, for PEFT's names: ``linear_qkv.lora_A.q`` beside ``linear_qkv.weight``.

Of a mixture of experts the attention's projections alone have adapters, which every token goes through:
parameters like those of a dense model, whose gradients are reduced over all data-parallel ranks whatever
``learn.ep`` is.  Experts and router stand still; a shared expert no family here has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from system.models.adapter import Adapter
from system.models.shape import ModelShape


class _Adapters(nn.Module):
    """(A, B) of the projections inside one linear layer; ``rows``: of each on this rank, in their order."""

    def __init__(self, layer: Any, adapter: Adapter, rows: Mapping[str, int], groups: int, cut: str) -> None:
        """``groups``: query groups that the rows are interleaved by, 1: none are.  ``cut``: A or B, which is
        split over the tensor-parallel ranks.
        """
        super().__init__()
        self._rows, self._groups, self._scale = dict(rows), groups, adapter.scale
        self.parts = [part for part in rows if part in adapter.parts]
        weight: torch.Tensor = layer.weight
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for part in self.parts:
            self.A[part] = nn.Parameter(weight.new_zeros(adapter.rank, weight.size(1)))
            self.B[part] = nn.Parameter(weight.new_zeros(rows[part], adapter.rank))
            whole, split = (self.A, self.B) if cut == "B" else (self.B, self.A)
            # Under sequence parallelism each rank's gradient of a whole factor is of its own tokens only.
            setattr(whole[part], "sequence_parallel", layer.config.sequence_parallel)  # noqa: B010
            # Counted on every rank in the gradient's norm, as it is another's on each.
            for name, value in (
                ("tensor_model_parallel", True),
                ("partition_dim", 0 if cut == "B" else 1),
                ("partition_stride", 1),
            ):
                setattr(split[part], name, value)

    def down(self, x: torch.Tensor) -> torch.Tensor:
        """[..., k · rank] of [..., in]: every part's A in one product."""
        return F.linear(x, torch.cat([self.A[part] for part in self.parts]))

    def up(self, low: torch.Tensor) -> torch.Tensor:
        """What is added to the layer's output; zeros where a projection has no adapter."""
        lows = dict(zip(self.parts, (self._scale * low).chunk(len(self.parts), -1), strict=True))
        pieces = [
            F.linear(lows[part], self.B[part]) if part in lows else low.new_zeros(*low.shape[:-1], rows)
            for part, rows in self._rows.items()
        ]
        grouped = [piece.unflatten(-1, (self._groups, -1)) for piece in pieces]
        return torch.cat(grouped, -1).flatten(-2)


class AdaptedColumn(ColumnParallelLinear):
    """A layer whose rows are split over the tensor-parallel ranks, with adapters."""

    def __init__(
        self, *args: Any, adapter: Adapter, rows: Mapping[str, int], groups: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.lora = _Adapters(self, adapter, rows, groups, cut="B")

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(input_)
        low = self.lora.down(input_)
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        # In place: it is the largest activation there is, and nothing keeps it as it was.
        return output.add_(self.lora.up(low)), bias


class AdaptedRow(RowParallelLinear):
    """A layer whose columns are split over the tensor-parallel ranks, with adapters."""

    def __init__(self, *args: Any, adapter: Adapter, rows: Mapping[str, int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora = _Adapters(self, adapter, rows, 1, cut="A")

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(input_)
        low = self.lora.down(input_)
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return output + self.lora.up(low), bias


def adapt_spec(layer: Any, shape: ModelShape, adapter: Adapter, tp: int) -> None:
    """Have the layers of a Megatron layer spec (its ``submodules``) built with adapters."""
    sizes = {part: size[0] for part, size in shape.layer_parts(0).items()}
    attention, mlp = layer.self_attention.submodules, layer.mlp.submodules
    for holder, name, kind, parts in (
        (attention, "linear_qkv", AdaptedColumn, ("q", "k", "v")),
        (attention, "linear_proj", AdaptedRow, ("out",)),
        (mlp, "linear_fc1", AdaptedColumn, ("gate", "up")),
        (mlp, "linear_fc2", AdaptedRow, ("down",)),
    ):
        if not set(parts) & set(adapter.parts):
            continue
        split = tp if kind is AdaptedColumn else 1
        extra: dict[str, Any] = {"rows": {part: sizes[part] // split for part in parts}}
        if name == "linear_qkv":
            extra["groups"] = shape.kv_heads // tp  # Megatron interleaves their rows
        setattr(holder, name, ModuleSpec(module=kind, params={"adapter": adapter, **extra}))


def freeze(model: nn.Module) -> None:
    """Only adapters learn from here on."""
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(key))


def is_adapter(key: str) -> bool:
    """Whether a Megatron parameter is one: ``….linear_qkv.lora.A.q``."""
    return ".lora." in key


def module_of(key: str) -> str:
    """The layer that a Megatron parameter belongs to, its adapters' too: ``….linear_qkv``."""
    return key.partition(".lora.")[0] if is_adapter(key) else key.rpartition(".")[0]


def drawn(name: str, size: tuple[int, ...], seed: int) -> torch.Tensor:
    """How the adapter tensor that PEFT calls ``name`` begins, float32, the same under every layout: A as
    ``kaiming_uniform(a=√5)``, B zero.
    """
    if ".lora_B." in name:
        return torch.zeros(size)
    own = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
    bound = size[1] ** -0.5  # gain √(1/3) times √(3 / fan-in)
    return torch.empty(size).uniform_(-bound, bound, generator=torch.Generator().manual_seed(own))


class AdapterCopy:
    """The adapters of a model as they were at some moment: the whole of another policy on the same weights.

    The reference policy costs megabytes so, not a second model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.tensors = {key: parameter.detach().clone() for key, parameter in self._adapters()}

    def _adapters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((key, one) for key, one in self._model.named_parameters() if is_adapter(key))

    @torch.no_grad()
    def follow(self) -> None:
        """Become what the model's adapters are now."""
        for key, parameter in self._adapters():
            self.tensors[key].copy_(parameter)

    @contextmanager
    def in_place(self) -> Generator[None]:
        """The model computes with these adapters."""
        own = {key: parameter.data for key, parameter in self._adapters()}
        try:
            for key, parameter in self._adapters():
                parameter.data = self.tensors[key]
            yield
        finally:
            for key, parameter in self._adapters():
                parameter.data = own[key]
