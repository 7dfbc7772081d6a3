"""A model's weights as the engine holds them: fused where that saves a matrix product, Hugging Face names
outside.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from system.errors import EspalierError
from system.models.directory import COMPUTED
from system.models.shape import ModelShape
from system.models.weights import WeightReader


class WeightsError(EspalierError, ValueError):
    """Offered weights do not fit the model; the message names the tensor.  Nothing was changed."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer.  H heads, G key/value heads, D head size, E hidden, F feed-forward.

    A sparse layer has a router, and for each of its n experts what another layer has once.
    """

    attention_norm: Tensor  # [E]
    qkv: Tensor  # [(H + 2G)·D, E]: q, k and v projections stacked
    out: Tensor  # [E, H·D]
    ffn_norm: Tensor  # [E]
    gate_up: Tensor  # [2F, E]; of a sparse layer [n, 2F, E]
    down: Tensor  # [E, F]; of a sparse layer [n, E, F]
    router: Tensor | None = None  # [n, E] of a sparse layer
    qkv_bias: Tensor | None = None  # [(H + 2G)·D]
    qk_norm: Tensor | None = None  # [H + G, D]: the q scale repeated for each q head, then the k scale


@dataclass(frozen=True, slots=True)
class Weights:
    embed: Tensor  # [V, E]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [E]
    head: Tensor  # [V, E]; the embedding itself when tied


def check(shape: ModelShape, dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> None:
    """Names, shapes and dtypes of a (partial) update.  Raises :class:`WeightsError` naming the bad tensor."""
    expected = shape.tensors()
    if (head := shape.tensor("head")) in tensors and head not in expected:
        raise WeightsError(f"{head}: the model's output head is tied to its embedding")
    check_tensors(expected, dtype, tensors)


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], dtype: torch.dtype, tensors: Mapping[str, Tensor]
) -> None:
    """Whether all of a (partial) update is expected, by name and shape.  Raises :class:`WeightsError`."""
    for name, tensor in tensors.items():
        if name not in expected:
            raise WeightsError(f"{name}: no such tensor in this model")
        if tuple(tensor.shape) != expected[name]:
            raise WeightsError(f"{name}: shape {tuple(tensor.shape)}, expected {expected[name]}")
        if tensor.dtype != dtype:
            raise WeightsError(f"{name}: dtype {tensor.dtype}, expected {dtype}")


def check_complete(expected: Collection[str], names: Container[str]) -> None:
    """Every tensor must be there: a forgotten one would go on serving old values unnoticed."""
    if missing := [name for name in expected if name not in names]:
        raise WeightsError(
            f"{missing[0]}: missing from the update ({len(missing)} of {len(expected)} tensors)"
        )


# What the fields of a layer hold: these parts of it, stacked, as far as it has them.
STACKED = {
    "attention_norm": ("attention_norm",),
    "qkv": ("q", "k", "v"),
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "out": ("out",),
    "ffn_norm": ("mlp_norm",),
    "router": ("router",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
# And of a sparse layer: these parts of each expert, stacked, one expert behind the other.
_OF_EXPERTS = {"gate_up": ("expert_gate", "expert_up"), "down": ("expert_down",)}


def _stacked(shape: ModelShape, layer: int) -> Iterator[tuple[str, list[str]]]:
    """The fields of a layer but for experts, and the names of the tensors that are stacked in each."""
    there = shape.layer_parts(layer)
    for field, parts in STACKED.items():
        if parts[0] in there:
            yield field, [shape.tensor(part, layer) for part in parts]


def _of_experts(shape: ModelShape, layer: int) -> Iterator[tuple[str, list[list[str]]]]:
    """The fields of a sparse layer's experts, and the names of the tensors that each expert has in them."""
    if shape.experts and shape.sparse(layer):
        count = range(shape.experts.count)
        for field, parts in _OF_EXPERTS.items():
            yield field, [[shape.tensor(part, layer, expert) for part in parts] for expert in count]


def fuse(shape: ModelShape, tensors: Mapping[str, Tensor], device: torch.device) -> Weights:
    """Copy a complete, checked set of Hugging Face tensors into the engine's weights."""

    def stack(*names: str) -> Tensor:
        return torch.cat([tensors[name].to(device) for name in names])

    layers = []
    for index in range(shape.layers):
        name = partial(shape.tensor, layer=index)
        fields: dict[str, Any] = {field: stack(*names) for field, names in _stacked(shape, index)}
        for field, experts in _of_experts(shape, index):
            fields[field] = torch.stack([stack(*names) for names in experts])
        if shape.family.qk_norm:
            q_scale, k_scale = stack(name("q_norm")), stack(name("k_norm"))
            both = [q_scale.expand(shape.heads, -1), k_scale.expand(shape.kv_heads, -1)]
            fields["qk_norm"] = torch.cat(both)
        layers.append(LayerWeights(**fields))
    embed = stack(shape.tensor("embedding"))
    head = embed if shape.tied else stack(shape.tensor("head"))
    return Weights(embed=embed, layers=tuple(layers), norm=stack(shape.tensor("norm")), head=head)


def unfuse(shape: ModelShape, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """The held weights under their Hugging Face names (views, no copies): the inverse of :func:`fuse`."""
    sizes = shape.tensors()

    def split(names: list[str], stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield from zip(names, stacked.split([sizes[name][0] for name in names]), strict=True)

    yield shape.tensor("embedding"), weights.embed
    for index, held in enumerate(weights.layers):
        name = partial(shape.tensor, layer=index)
        for field, names in _stacked(shape, index):
            yield from split(names, getattr(held, field))
        for field, experts in _of_experts(shape, index):
            for names, expert in zip(experts, getattr(held, field), strict=True):
                yield from split(names, expert)
        if held.qk_norm is not None:
            yield name("q_norm"), held.qk_norm[0]
            yield name("k_norm"), held.qk_norm[shape.heads]
    yield shape.tensor("norm"), weights.norm
    if not shape.tied:
        yield shape.tensor("head"), weights.head


@torch.inference_mode()
def load(path: Path, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> Weights:
    """What a Hugging Face directory's safetensors files hold, cast to ``dtype`` and checked."""
    tensors: dict[str, Tensor] = {}
    reader = WeightReader(path)
    reader.check_tied(shape, dtype)
    for name in reader.names():
        if (name == shape.tensor("head") and shape.tied) or name.endswith(COMPUTED):
            continue  # some exporters write the tied head a second time, and older ones frequencies
        tensors[name] = reader.read(name, dtype)
    check(shape, dtype, tensors)
    check_complete(shape.tensors(), tensors)
    return fuse(shape, tensors, device)
