"""Low-rank adapters (LoRA, arXiv 2106.09685) of a model's projections, and their files in PEFT's format.

A projection W gets two matrices: y = W x + scale · B A x with A [rank, in], B [out, rank], scale = alpha /
rank.  Their names are PEFT's, in files and on the way to engines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from system.config import LoraConfig
from system.errors import ConfigError
from system.models.files import write_weights
from system.models.shape import ModelShape

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROJECTIONS = ("q", "k", "v", "out", "gate", "up", "down")  # parts of a layer that can have adapters
_PREFIX = "base_model.model."
# What an adapter_config.json may say beyond that, with other values than these, would be computed wrongly.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    **dict.fromkeys(("use_dora", "use_rslora", "use_qalora", "fan_in_fan_out", "lora_bias"), (False, None)),
    **dict.fromkeys(
        (
            "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
            "layer_replication", "megatron_config", "trainable_token_indices", "target_parameters",
        ),
        (None, {}, []),
    ),
}  # fmt: skip


class AdapterError(ConfigError):
    """A directory that holds no adapters, or not those that are wanted; the message names it."""


@dataclass(frozen=True)
class Adapter:
    """Which projections of every layer have adapters, and of which kind."""

    rank: int
    alpha: float
    parts: tuple[str, ...]  # of a layer, words of ``families.base.NAMES``

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def tensors(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Every adapter tensor's name and shape, layer by layer."""
        found: dict[str, tuple[int, ...]] = {}
        for layer in range(shape.layers):
            for part in self.parts:
                wide, narrow = shape.layer_parts(0)[part]
                a, b = factors(shape.tensor(part, layer))
                found |= {a: (self.rank, narrow), b: (wide, self.rank)}
        return found

    def merged(
        self, weights: Mapping[str, torch.Tensor], adapters: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """``weights`` of the model, by name, each with its adapter, if there is one among ``adapters``, added
        in: W + scale · B A, computed in float32.
        """
        merged = dict(weights)
        for name, weight in weights.items():
            a, b = map(adapters.get, factors(name))
            if a is not None and b is not None:
                merged[name] = (weight.float() + self.scale * (b.float() @ a.float())).to(weight.dtype)
        return merged

    def peft_config(self, shape: ModelShape) -> dict[str, Any]:
        """What PEFT's ``adapter_config.json`` says of the adapters themselves."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": modules_of(shape, self.parts),
        }

    def write(
        self, directory: Path, shape: ModelShape, adapters: Mapping[str, torch.Tensor], base: str
    ) -> None:
        """PEFT's two files into ``directory``; ``base``: the model that they belong to."""
        directory.mkdir(parents=True, exist_ok=True)
        write_weights({name: tensor.contiguous() for name, tensor in adapters.items()}, directory / WEIGHTS)
        config = self.peft_config(shape) | {"base_model_name_or_path": base, "inference_mode": True}
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def adapter_of(lora: LoraConfig) -> Adapter | None:
    """What ``learn.lora`` asks for; None: the whole model is trained."""
    return Adapter(lora.rank, lora.alpha, lora.parts) if lora.on else None


def factors(name: str) -> tuple[str, str]:
    """What PEFT calls A and B of the projection ``name``, as the model's files call it."""
    module = _PREFIX + name.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def read_adapter(path: str | Path, shape: ModelShape, wanted: Adapter) -> dict[str, torch.Tensor]:
    """The tensors of a directory in PEFT's format, which must hold ``wanted`` for a model of ``shape``.

    Raises :class:`AdapterError` for anything else, naming the settings to change.
    """
    directory = Path(path)
    for file in (CONFIG, WEIGHTS):
        if not (directory / file).is_file():
            raise AdapterError(f"{directory}: no adapters in PEFT's format: {file} is missing")
    try:
        config: dict[str, Any] = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(directory / WEIGHTS)
    except (ValueError, OSError, SafetensorError) as error:
        raise AdapterError(f"{directory}: the adapters cannot be read: {error}") from error
    for key, plain in _PLAIN.items():
        if (value := config.get(key, plain[0])) not in plain:
            raise AdapterError(f"{directory / CONFIG}: {key}={value!r} is not computed here")
    targets = config.get("target_modules")
    if targets == "all-linear":
        targets = [*modules_of(shape, PROJECTIONS)]
    if not isinstance(targets, list):
        raise AdapterError(f"{directory / CONFIG}: target_modules={targets!r}: name the modules in a list")
    for key, value, needed in (
        ("learn.lora.rank", config.get("r"), wanted.rank),
        ("learn.lora.alpha", config.get("lora_alpha"), wanted.alpha),
        ("learn.lora.targets", sorted(map(str, targets)), sorted(modules_of(shape, wanted.parts))),
    ):
        if value != needed:
            raise AdapterError(f"{directory}: {key} of these adapters is {value}, not {needed}: set it so")
    shapes = wanted.tensors(shape)
    for name in sorted(shapes.keys() ^ tensors.keys()):
        what = "it lacks" if name in shapes else "this model has no place for"
        raise AdapterError(f"{directory / WEIGHTS}: {what} {name}")
    for name, size in shapes.items():
        if tuple(tensors[name].shape) != size:
            raise AdapterError(
                f"{directory / WEIGHTS}: {name} has shape {tuple(tensors[name].shape)}, not {size}"
            )
    return tensors


def modules_of(shape: ModelShape, parts: Iterable[str]) -> list[str]:
    """What PEFT calls projections in ``target_modules``: ``q_proj``."""
    return [shape.tensor(part, 0).split(".")[-2] for part in parts]
