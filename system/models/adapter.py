"""Low-rank adapters (LoRA, arXiv 2106.09685) of a model's projections, and their files in PEFT's format.

A projection W gets two matrices: y = W x + scale · B A x with A [rank, in], B [out, rank], scale = alpha /
rank.  Their names are PEFT's, in files and on the way to engines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from system.config import LoraConfig
from system.config.schema_lora import MODULES
from system.errors import ConfigError
from system.models.files import write_weights
from system.models.shape import ModelShape
from system.models.weights import fingerprint, finite
from system.whole import appearing

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROJECTIONS = tuple(MODULES)  # parts of a layer that can have adapters
MERGED = 1 << 22  # numbers of a weight that are merged at one time: 16 MiB each of some float32 copies
_PREFIX = "base_model.model."
_BASE = "base_model_fingerprint"  # in the metadata of the tensors: PEFT's own file takes no other keys
# Keys of an adapter_config.json that change nothing of what the adapters compute, whatever they say.
_ANY = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "lora_dropout",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
_READ = {"r", "lora_alpha", "target_modules"}
# Those that have to have one of these values, and why.  Any other key has to be off: what PEFT will know
# tomorrow is not computed here.
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "peft_type": (("LORA",), "another method than LoRA"),
    "bias": (("none", None), "biases that were trained are not read"),
    "init_lora_weights": (
        (True, False, None, "gaussian", "eva", "orthogonal"),
        "such adapters may go with a base model whose weights it has changed; PEFT's save_pretrained "
        "converts them (path_initial_model_for_weight_conversion)",
    ),
}
_OFF = (None, False, {}, [], "")
_WHY_OFF = {
    "alora_invocation_tokens": "adapters that begin at certain tokens",
    "alpha_pattern": "every layer has the same alpha here",
    "exclude_modules": "every layer has the same projections here: list those that have adapters",
    "fan_in_fan_out": "weights that are stored transposed",
    "layer_replication": "layers that the model has not",
    "layers_to_transform": "every layer has adapters here",
    "lora_bias": "biases beside B are not read",
    "modules_to_save": "whole modules that were trained are not read",
    "rank_pattern": "every layer has the same rank here",
    "target_parameters": "adapters of single parameters are not read",
    "trainable_token_indices": "embeddings that were trained are not read",
    "use_dora": "DoRA's magnitudes are not computed",
    "use_rslora": "outputs are scaled by alpha / rank here, not by alpha / √rank",
}


class AdapterError(ConfigError):
    """A directory that holds no adapters, or not those that are wanted; the message names it."""


class Rounding:
    """How much of a change of weights is left of it once the changed weights are rounded."""

    def __init__(self) -> None:
        self._wanted: torch.Tensor | float = 0.0  # squared norms
        self._lost: torch.Tensor | float = 0.0

    def add(self, wanted: torch.Tensor, made: torch.Tensor) -> None:
        """One weight's change in float32: as computed, and as it is after rounding."""
        self._wanted = self._wanted + torch.linalg.vector_norm(wanted).double() ** 2
        self._lost = self._lost + torch.linalg.vector_norm(made - wanted).double() ** 2

    @property
    def kept(self) -> float | None:
        """1 - |made - wanted|² / |wanted|² over all weights: 1 where nothing is lost, 0 where every weight is
        as it was; never less, as rounding takes the nearest number, and the old weight is one of those there
        are.  None: nothing was to change.
        """
        wanted = float(self._wanted)
        return 1.0 - float(self._lost) / wanted if wanted else None


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
        self,
        weights: Mapping[str, torch.Tensor],
        adapters: Mapping[str, torch.Tensor],
        rounding: Rounding | None = None,
    ) -> dict[str, torch.Tensor]:
        """``weights`` of the model, by name, each with its adapter, if there is one among ``adapters``, added
        in: W + scale · B A, computed in float32, ``MERGED`` numbers at a time, rounded to the weight's dtype.
        ``rounding`` takes in what that costs.
        """
        merged = dict(weights)
        for name, weight in weights.items():
            a, b = map(adapters.get, factors(name))
            if a is not None and b is not None:
                merged[name] = torch.empty_like(weight)
                for rows in _slices(weight):
                    change = self.scale * (b[rows].float() @ a.float())
                    merged[name][rows] = weight[rows].float() + change
                    if rounding is not None:
                        rounding.add(change, merged[name][rows].float() - weight[rows].float())
        return merged

    def peft_config(self) -> dict[str, Any]:
        """What PEFT's ``adapter_config.json`` says of the adapters themselves."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": [MODULES[part] for part in self.parts],
        }

    def write(
        self, directory: Path, adapters: Mapping[str, torch.Tensor], base: str, model: str | Path
    ) -> None:
        """PEFT's two files as ``directory``, which appears whole, in place of an older one; ``base``: what
        the ``model`` that they belong to is called.
        """
        tensors = {name: tensor.contiguous() for name, tensor in adapters.items()}
        config = self.peft_config() | {"base_model_name_or_path": base, "inference_mode": True}
        with appearing(directory) as partial:
            write_weights(tensors, partial / WEIGHTS, **{_BASE: fingerprint(model)})
            (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _slices(weight: torch.Tensor) -> list[slice]:
    """Rows of a matrix that are merged at one time."""
    each = max(1, MERGED // weight.size(1))
    return [slice(row, row + each) for row in range(0, len(weight), each)]


def adapter_of(lora: LoraConfig, shape: ModelShape) -> Adapter | None:
    """What ``learn.lora`` asks for of a model of ``shape``; None: the whole model is trained."""
    parts = lora.parts(experts=shape.experts is not None)
    return Adapter(lora.rank, lora.alpha, parts) if lora.on else None


def factors(name: str) -> tuple[str, str]:
    """What PEFT calls A and B of the projection ``name``, as the model's files call it."""
    module = _PREFIX + name.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def stated_base(path: str | Path) -> tuple[str, str]:
    """(Name, fingerprint) of the model that adapters belong to, as their files have them; empty: not at all.

    Raises what reading them raises.
    """
    directory = Path(path)
    config: Any = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    with safe_open(directory / WEIGHTS, framework="pt") as file:
        metadata: Mapping[str, str] = file.metadata() or {}
    return str(config.get("base_model_name_or_path") or ""), metadata.get(_BASE, "")


def read_adapter(
    path: str | Path, shape: ModelShape, wanted: Adapter, model: str | Path = ""
) -> dict[str, torch.Tensor]:
    """The tensors of a directory in PEFT's format, which must hold ``wanted`` for a model of ``shape``.

    ``model``: the directory of the one that they are to go with, to be compared with the one that they were
    trained on.  Raises :class:`AdapterError` for anything else, naming the settings to change.
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
    for key, value in config.items():
        if why := _refused(key, value):
            raise AdapterError(f"{directory / CONFIG}: {key}={value!r} is not computed here: {why}")
    targets = config.get("target_modules")
    if targets == "all-linear":
        targets = [MODULES[part] for part in LoraConfig().parts(experts=shape.experts is not None)]
    if not isinstance(targets, list):
        raise AdapterError(f"{directory / CONFIG}: target_modules={targets!r}: name the modules in a list")
    for key, value, needed in (
        ("learn.lora.rank", config.get("r"), wanted.rank),
        ("learn.lora.alpha", config.get("lora_alpha"), wanted.alpha),
        ("learn.lora.targets", sorted(map(str, targets)), sorted(MODULES[part] for part in wanted.parts)),
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
        if not finite(tensors[name]):
            raise AdapterError(
                f"{directory / WEIGHTS}: {name} holds numbers that are not finite (NaN, infinite): their "
                "training failed, or the file is damaged; take other ones"
            )
    name, base = stated_base(directory)
    if model and base and base != fingerprint(model):
        raise AdapterError(
            f"{directory}: these adapters were trained on another model than {model} ({name or 'unnamed'}, "
            "other weights of the same shapes, or a float8 copy), with which they are worth nothing: set "
            "model.path to that one"
        )
    return tensors


def _refused(key: str, value: Any) -> str:
    """Why adapters whose configuration has ``key: value`` are not taken; empty: they are."""
    if key in _ANY or key in _READ:
        return ""
    allowed, why = _ONLY.get(key, (_OFF, _WHY_OFF.get(key, "a way of PEFT's that is not known here")))
    return "" if any(value is one or value == one for one in allowed) else why
