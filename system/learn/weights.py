"""Weights between Hugging Face files and Megatron's tensor-parallel shards, in both directions.

Everything streams: loading reads one Hugging Face tensor at a time, exporting gathers one Megatron parameter
at a time over the tensor-parallel group and hands it on in buckets of bounded size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import safe_open
from safetensors.torch import save_file

from system.config import ConfigError
from system.learn.model import TreeGPTModel, padded_vocab_size

INDEX = "model.safetensors.index.json"
Layout = Literal["replicated", "qkv", "gate-up", "row", "vocabulary"]

# Megatron name within a layer -> (how it is split over tensor-parallel ranks, Hugging Face names within the
# layer).
_LAYER: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "input_layernorm.weight": ("replicated", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": ("qkv", tuple(f"self_attn.{x}_proj.weight" for x in "qkv")),
    "self_attention.linear_qkv.bias": ("qkv", tuple(f"self_attn.{x}_proj.bias" for x in "qkv")),
    "self_attention.linear_proj.weight": ("row", ("self_attn.o_proj.weight",)),
    "self_attention.q_layernorm.weight": ("replicated", ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": ("replicated", ("self_attn.k_norm.weight",)),
    "pre_mlp_layernorm.weight": ("replicated", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": ("gate-up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": ("row", ("mlp.down_proj.weight",)),
}
_TOP: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "embedding.word_embeddings.weight": ("vocabulary", ("model.embed_tokens.weight",)),
    "output_layer.weight": ("vocabulary", ("lm_head.weight",)),
    "decoder.final_layernorm.weight": ("replicated", ("model.norm.weight",)),
}


@dataclass(frozen=True)
class Converter:
    """Splits and merges the tensors of one model.  ``tp`` ranks, this one being ``rank``."""

    model: TreeGPTModel
    tp: int
    rank: int

    @staticmethod
    def of(model: TreeGPTModel) -> Converter:
        return Converter(
            model,
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_rank(),
        )

    def place(self, name: str) -> tuple[Layout, tuple[str, ...]]:
        """Layout and full Hugging Face names of a Megatron parameter."""
        if name in _TOP:
            return _TOP[name]
        _decoder, _layers, number, suffix = name.split(".", 3)
        layout, names = _LAYER[suffix]
        return layout, tuple(f"model.layers.{number}.{n}" for n in names)

    def shard(self, layout: Layout, full: list[torch.Tensor]) -> torch.Tensor:
        """This rank's Megatron shard from the full Hugging Face tensors."""
        match layout:
            case "replicated":
                return full[0]
            case "row":
                return full[0].chunk(self.tp, 1)[self.rank]
            case "gate-up":
                return torch.cat([t.chunk(self.tp, 0)[self.rank] for t in full])
            case "vocabulary":
                rows = padded_vocab_size(full[0].size(0), self.tp) - full[0].size(0)
                padded = torch.cat([full[0], full[0].new_zeros(rows, full[0].size(1))])
                return padded.chunk(self.tp, 0)[self.rank]
            case "qkv":
                # Megatron interleaves by query group: [group][its queries, its key, its value][head dim].
                groups, rest = self._groups, full[0].shape[1:]
                grouped = torch.cat([t.view(groups, -1, *rest) for t in full], dim=1)
                return grouped.reshape(-1, *rest).chunk(self.tp, 0)[self.rank]

    def merge(self, layout: Layout, shards: list[torch.Tensor]) -> list[torch.Tensor]:
        """The inverse of :meth:`shard`, from the shards of all ranks in rank order."""
        match layout:
            case "replicated":
                return [shards[0]]
            case "row":
                return [torch.cat(shards, 1)]
            case "gate-up":
                halves = [s.chunk(2, 0) for s in shards]
                return [torch.cat([h[0] for h in halves]), torch.cat([h[1] for h in halves])]
            case "vocabulary":
                return [torch.cat(shards)[: self.model.real_vocab_size]]
            case "qkv":
                d = self.model.config.kv_channels
                assert d is not None
                whole = torch.cat(shards)
                rest = whole.shape[1:]
                grouped = whole.view(self._groups, -1, *rest)
                parts = grouped[:, : -2 * d], grouped[:, -2 * d : -d], grouped[:, -d:]
                return [p.reshape(-1, *rest) for p in parts]

    @property
    def _groups(self) -> int:
        groups = self.model.config.num_query_groups
        assert groups is not None
        return groups

    def gather(self, layout: Layout, shard: torch.Tensor) -> list[torch.Tensor]:
        """All ranks' shards of one parameter; collective over the tensor-parallel group."""
        shard = shard.detach().contiguous()
        if layout == "replicated" or self.tp == 1:
            return [shard]
        shards = [torch.empty_like(shard) for _ in range(self.tp)]
        dist.all_gather(shards, shard, group=parallel_state.get_tensor_model_parallel_group())
        return shards


@torch.no_grad()
def load(model: TreeGPTModel, get: Callable[[str], torch.Tensor]) -> None:
    """Fill this rank's shard.  ``get(name)`` gives one full Hugging Face tensor (see :func:`hf_tensors`)."""
    converter = Converter.of(model)
    for name, parameter in model.named_parameters():
        layout, names = converter.place(name)
        shard = converter.shard(layout, [get(n) for n in names])
        if shard.shape != parameter.shape:
            raise ConfigError(
                f"{', '.join(names)}: shape gives {tuple(shard.shape)}, not {tuple(parameter.shape)}"
            )
        parameter.copy_(shard)


def hf_tensors(path: str | Path) -> Callable[[str], torch.Tensor]:
    """Read single tensors by name from a Hugging Face directory's safetensors files."""
    path = Path(path)
    if (path / INDEX).is_file():
        files: Mapping[str, str] = json.loads((path / INDEX).read_text())["weight_map"]
    elif (path / "model.safetensors").is_file():
        with safe_open(path / "model.safetensors", framework="pt") as file:
            files = dict.fromkeys(file.keys(), "model.safetensors")
    else:
        raise ConfigError(f"{path}: no safetensors weights (model.safetensors or {INDEX})")

    def get(name: str) -> torch.Tensor:
        if name not in files:
            raise ConfigError(f"{path}: the weights lack {name}")
        with safe_open(path / files[name], framework="pt") as file:
            return file.get_tensor(name)

    return get


def stream(model: TreeGPTModel) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """(Hugging Face name, full tensor) pairs, one Megatron parameter at a time; collective over TP, all ranks
    receive.
    """
    converter = Converter.of(model)
    for name, parameter in model.named_parameters():
        layout, names = converter.place(name)
        yield list(zip(names, converter.merge(layout, converter.gather(layout, parameter)), strict=True))


def buckets(model: TreeGPTModel, max_bytes: int, *, receive: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Full tensors on CPU in buckets of at most ``max_bytes`` (one parameter at least).

    Collective over the tensor-parallel group.  Ranks with ``receive=False`` get the same number of empty
    buckets.
    """
    bucket: dict[str, torch.Tensor] = {}
    filled = 0
    for tensors in stream(model):
        size = sum(t.numel() * t.element_size() for _, t in tensors)
        if filled and filled + size > max_bytes:
            yield bucket
            bucket, filled = {}, 0
        filled += size
        if receive:
            # A copy: the next optimizer step must not reach a bucket that is still being sent.
            bucket |= {n: t.to("cpu", copy=True).contiguous() for n, t in tensors}
    yield bucket


def save_hf(
    model: TreeGPTModel, path: Path, source: str | Path, *, write: bool, shard_bytes: int = 2**31
) -> None:
    """Write a complete Hugging Face directory; collective over TP, only ``write=True`` ranks touch the disk.

    Configuration and tokenizer files are copied from ``source``.  The directory appears under its name only
    when complete, and replaces an older one.
    """
    partial = path.with_name(path.name + ".partial")
    if write:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in Path(source).iterdir():
            if file.suffix in (".json", ".txt", ".model", ".jinja") and file.name != INDEX:
                shutil.copy(file, partial)
        _state_dtype(partial / "config.json", model.config.params_dtype)
    where: dict[str, str] = {}
    total = 0
    for number, bucket in enumerate(buckets(model, shard_bytes, receive=write)):
        if write:
            file_name = f"model-{number:05d}.safetensors"
            save_file(bucket, partial / file_name, metadata={"format": "pt"})
            where |= dict.fromkeys(bucket, file_name)
            total += sum(t.numel() * t.element_size() for t in bucket.values())
    if not write:
        return
    if len(set(where.values())) == 1:
        (partial / "model-00000.safetensors").rename(partial / "model.safetensors")
    else:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (partial / INDEX).write_text(json.dumps(index, indent=2))
    replace(partial, path)


def replace(partial: Path, path: Path) -> None:
    """Give a finished directory its final name, in place of an older one."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _state_dtype(config_file: Path, dtype: torch.dtype) -> None:
    config: dict[str, Any] = json.loads(config_file.read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2) + "\n")
