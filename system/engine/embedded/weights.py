"""A model's weights as the engine holds them: fused where that saves a matrix product, Hugging Face names
outside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from system.errors import EspalierError
from system.models.files import weight_files
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


def check_complete(shape: ModelShape, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor of the model must be there: a forgotten one would go on serving old values unnoticed."""
    missing = [name for name in shape.tensors() if name not in tensors]
    if missing:
        raise WeightsError(
            f"{missing[0]}: missing from the update ({len(missing)} of {len(shape.tensors())} tensors)"
        )


def fuse(shape: ModelShape, tensors: Mapping[str, Tensor], device: torch.device) -> Weights:
    """Build the engine's weights from a complete, checked set of Hugging Face tensors."""

    def get(name: str) -> Tensor:
        return tensors[name].to(device)

    def stack(prefix: str, parts: tuple[str, ...], suffix: str) -> Tensor:
        return torch.cat([get(prefix + part + suffix) for part in parts]).contiguous()

    layers = []
    for index in range(shape.layers):
        layer = f"model.layers.{index}."
        attention = layer + "self_attn."
        qk_norm = None
        if shape.qk_norm:
            q_scale = get(attention + "q_norm.weight").expand(shape.heads, -1)
            k_scale = get(attention + "k_norm.weight").expand(shape.kv_heads, -1)
            qk_norm = torch.cat([q_scale, k_scale]).contiguous()
        qkv = ("q", "k", "v")
        layers.append(
            LayerWeights(
                attention_norm=get(layer + "input_layernorm.weight").clone(),
                qkv=stack(attention, qkv, "_proj.weight"),
                qkv_bias=stack(attention, qkv, "_proj.bias") if shape.qkv_bias else None,
                qk_norm=qk_norm,
                out=get(attention + "o_proj.weight").clone(),
                out_bias=get(attention + "o_proj.bias").clone() if shape.o_bias else None,
                ffn_norm=get(layer + "post_attention_layernorm.weight").clone(),
                gate_up=stack(layer + "mlp.", ("gate", "up"), "_proj.weight"),
                down=get(layer + "mlp.down_proj.weight").clone(),
            )
        )
    embed = get("model.embed_tokens.weight").clone()
    head = embed if shape.tied else get("lm_head.weight").clone()
    return Weights(embed=embed, layers=tuple(layers), norm=get("model.norm.weight").clone(), head=head)


def unfuse(shape: ModelShape, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """The held weights under their Hugging Face names (views, no copies): the inverse of :func:`fuse`."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", weights.embed
    for index, held in enumerate(weights.layers):
        layer = f"model.layers.{index}."
        attention = layer + "self_attn."
        yield layer + "input_layernorm.weight", held.attention_norm
        for part, rows in zip(("q", "k", "v"), held.qkv.split([q, kv, kv]), strict=True):
            yield f"{attention}{part}_proj.weight", rows
        if held.qkv_bias is not None:
            for part, rows in zip(("q", "k", "v"), held.qkv_bias.split([q, kv, kv]), strict=True):
                yield f"{attention}{part}_proj.bias", rows
        if held.qk_norm is not None:
            yield attention + "q_norm.weight", held.qk_norm[0]
            yield attention + "k_norm.weight", held.qk_norm[shape.heads]
        yield attention + "o_proj.weight", held.out
        if held.out_bias is not None:
            yield attention + "o_proj.bias", held.out_bias
        yield layer + "post_attention_layernorm.weight", held.ffn_norm
        gate, up = held.gate_up.split([shape.ffn, shape.ffn])
        yield layer + "mlp.gate_proj.weight", gate
        yield layer + "mlp.up_proj.weight", up
        yield layer + "mlp.down_proj.weight", held.down
    yield "model.norm.weight", weights.norm
    if not shape.tied:
        yield "lm_head.weight", weights.head


def read_directory(path: str | Path, shape: ModelShape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a Hugging Face directory's safetensors files, cast to ``dtype`` and checked."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_files(path).values())):
        with safe_open(Path(path) / file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (the reader is not a mapping)
                if name == "lm_head.weight" and shape.tied:
                    continue  # some exporters write the tied head a second time
                tensors[name] = reader.get_tensor(name).to(dtype)
    check(shape, dtype, tensors)
    check_complete(shape, tensors)
    return tensors
