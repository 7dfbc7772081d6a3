"""A model's weights as the engine holds them: fused where that saves a matrix product, Hugging Face names
outside.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from system.errors import EspalierError
from system.models.directory import weight_files
from system.models.shape import ModelShape

_COMPUTED = "rotary_emb.inv_freq"  # in files of early Llamas


class WeightsError(EspalierError, ValueError):
    """Offered weights do not fit the model; the message names the tensor.  Nothing was changed."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer.  H heads, G key/value heads, D head size, E hidden, F feed-forward."""

    attention_norm: Tensor  # [E]
    qkv: Tensor  # [(H + 2G)·D, E]: q, k and v projections stacked
    qkv_bias: Tensor | None  # [(H + 2G)·D]
    qk_norm: Tensor | None  # [H + G, D]: the q scale repeated for each q head, then the k scale
    out: Tensor  # [E, H·D]
    ffn_norm: Tensor  # [E]
    gate_up: Tensor  # [2F, E]
    down: Tensor  # [E, F]


@dataclass(frozen=True, slots=True)
class Weights:
    embed: Tensor  # [V, E]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [E]
    head: Tensor  # [V, E]; the embedding itself when tied


def check(shape: ModelShape, dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> None:
    """Names, shapes and dtypes of a (partial) update.  Raises :class:`WeightsError` naming the bad tensor."""
    expected = shape.tensors()
    for name, tensor in tensors.items():
        if name not in expected:
            is_head = name == shape.tensor("head")
            tied = " (the model's output head is tied to its embedding)" if is_head else ""
            raise WeightsError(f"{name}: no such tensor in this model{tied}")
        if tuple(tensor.shape) != expected[name]:
            raise WeightsError(f"{name}: shape {tuple(tensor.shape)}, expected {expected[name]}")
        if tensor.dtype != dtype:
            raise WeightsError(f"{name}: dtype {tensor.dtype}, expected {dtype}")


def check_complete(shape: ModelShape, names: Container[str]) -> None:
    """Every tensor of the model must be there: a forgotten one would go on serving old values unnoticed."""
    missing = [name for name in shape.tensors() if name not in names]
    if missing:
        raise WeightsError(
            f"{missing[0]}: missing from the update ({len(missing)} of {len(shape.tensors())} tensors)"
        )


# What the fields of a layer hold: these parts of it, stacked.
STACKED = {
    "attention_norm": ("attention_norm",),
    "qkv": ("q", "k", "v"),
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "out": ("out",),
    "ffn_norm": ("mlp_norm",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}


def fuse(shape: ModelShape, tensors: Mapping[str, Tensor], device: torch.device) -> Weights:
    """Copy a complete, checked set of Hugging Face tensors into the engine's weights."""

    def stack(*names: str) -> Tensor:
        return torch.cat([tensors[name].to(device) for name in names])

    layers = []
    for index in range(shape.layers):
        name = partial(shape.tensor, layer=index)
        fields: dict[str, Any] = {
            field: stack(*map(name, parts)) if parts[0] in shape.layer_parts else None
            for field, parts in STACKED.items()
        }
        qk_norm = None
        if shape.family.qk_norm:
            q_scale, k_scale = stack(name("q_norm")), stack(name("k_norm"))
            qk_norm = torch.cat([q_scale.expand(shape.heads, -1), k_scale.expand(shape.kv_heads, -1)])
        layers.append(LayerWeights(**fields, qk_norm=qk_norm))
    embed = stack(shape.tensor("embedding"))
    head = embed if shape.tied else stack(shape.tensor("head"))
    return Weights(embed=embed, layers=tuple(layers), norm=stack(shape.tensor("norm")), head=head)


def unfuse(shape: ModelShape, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """The held weights under their Hugging Face names (views, no copies): the inverse of :func:`fuse`."""
    sizes = shape.tensors()
    yield shape.tensor("embedding"), weights.embed
    for index, held in enumerate(weights.layers):
        name = partial(shape.tensor, layer=index)
        for field, parts in STACKED.items():
            stacked: Tensor | None = getattr(held, field)
            if stacked is not None:
                names = [name(part) for part in parts]
                yield from zip(names, stacked.split([sizes[one][0] for one in names]), strict=True)
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
    for file in sorted(set(weight_files(path).values())):
        with safe_open(path / file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (the reader is not a mapping)
                if (name == shape.tensor("head") and shape.tied) or name.endswith(_COMPUTED):
                    continue  # some exporters write the tied head a second time, and older ones frequencies
                tensors[name] = reader.get_tensor(name).to(dtype)
    check(shape, dtype, tensors)
    check_complete(shape, tensors)
    return fuse(shape, tensors, device)
