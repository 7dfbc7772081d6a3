"""A model's weights as the engine holds them: fused where that saves a matrix product, Hugging Face names
outside.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from system.errors import EspalierError
from system.models.directory import weight_files
from system.models.shape import ModelShape


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
    out_bias: Tensor | None  # [E]
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
            tied = " (the model's output head is tied to its embedding)" if name == "lm_head.weight" else ""
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


# What the fields of a layer hold: these Hugging Face tensors of it, stacked.
_STACKED = {
    "attention_norm": ("input_layernorm.weight",),
    "qkv": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "qkv_bias": tuple(f"self_attn.{part}_proj.bias" for part in "qkv"),
    "out": ("self_attn.o_proj.weight",),
    "out_bias": ("self_attn.o_proj.bias",),
    "ffn_norm": ("post_attention_layernorm.weight",),
    "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down": ("mlp.down_proj.weight",),
}
_Q_NORM, _K_NORM = "self_attn.q_norm.weight", "self_attn.k_norm.weight"


def fuse(shape: ModelShape, tensors: Mapping[str, Tensor], device: torch.device) -> Weights:
    """Copy a complete, checked set of Hugging Face tensors into the engine's weights."""

    def stack(*names: str) -> Tensor:
        return torch.cat([tensors[name].to(device) for name in names])

    layers = []
    for index in range(shape.layers):
        layer = f"model.layers.{index}."
        fields: dict[str, Any] = {
            field: stack(*(layer + part for part in parts)) if layer + parts[0] in tensors else None
            for field, parts in _STACKED.items()
        }
        qk_norm = None
        if shape.qk_norm:
            q_scale, k_scale = stack(layer + _Q_NORM), stack(layer + _K_NORM)
            qk_norm = torch.cat([q_scale.expand(shape.heads, -1), k_scale.expand(shape.kv_heads, -1)])
        layers.append(LayerWeights(**fields, qk_norm=qk_norm))
    embed = stack("model.embed_tokens.weight")
    head = embed if shape.tied else stack("lm_head.weight")
    return Weights(embed=embed, layers=tuple(layers), norm=stack("model.norm.weight"), head=head)


def unfuse(shape: ModelShape, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """The held weights under their Hugging Face names (views, no copies): the inverse of :func:`fuse`."""
    sizes = shape.tensors()
    yield "model.embed_tokens.weight", weights.embed
    for index, held in enumerate(weights.layers):
        layer = f"model.layers.{index}."
        for field, parts in _STACKED.items():
            stacked: Tensor | None = getattr(held, field)
            if stacked is not None:
                names = [layer + part for part in parts]
                yield from zip(names, stacked.split([sizes[name][0] for name in names]), strict=True)
        if held.qk_norm is not None:
            yield layer + _Q_NORM, held.qk_norm[0]
            yield layer + _K_NORM, held.qk_norm[shape.heads]
    yield "model.norm.weight", weights.norm
    if not shape.tied:
        yield "lm_head.weight", weights.head


@torch.inference_mode()
def load(path: Path, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> Weights:
    """What a Hugging Face directory's safetensors files hold, cast to ``dtype`` and checked."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_files(path).values())):
        with safe_open(path / file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (the reader is not a mapping)
                if name == "lm_head.weight" and shape.tied:
                    continue  # some exporters write the tied head a second time
                tensors[name] = reader.get_tensor(name).to(dtype)
    check(shape, dtype, tensors)
    check_complete(shape, tensors)
    return fuse(shape, tensors, device)
