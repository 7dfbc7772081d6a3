"""Checkpoints whose matrices are float8 numbers with scales: which kinds are read, and what the others are
refused for.

A stored number times its scale is the weight.  A scale is shared by a block of a matrix (the ``fp8`` of
transformers, DeepSeek and Qwen3's published FP8 models: ``weight_scale_inv``, which is the factor in spite of
its name), by a row, or by the whole matrix (``weight_scale`` of compressed-tensors and of AutoFP8).  This
module knows names and shapes alone; :mod:`system.models.weights` multiplies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from system.models.reading import UnsupportedModel

STORED = "F8_E4M3"  # safetensors' name of the one format that is read
CONFIGS = ("quantization_config", "compression_config")  # keys of config.json; the second is an older name
_SCALES = ("weight_scale_inv", "weight_scale")
_SERVING = ("input_scale", "output_scale", "k_scale", "v_scale")  # of activations: no part of a weight
_REMEDY = "take the model's bfloat16 or float32 weights, or float8 ones (quant_method fp8)"


@dataclass(frozen=True, slots=True)
class Float8:
    """How a float8 checkpoint is scaled."""

    block: tuple[int, int] | None  # rows and columns of a block; None: rows or whole matrices have a scale

    @classmethod
    def of_directory(cls, path: str | Path) -> Float8 | None:
        """What ``config.json`` says, None for weights that are stored as they are.

        Raises :class:`UnsupportedModel` for another quantisation.
        """
        file = Path(path) / "config.json"
        try:
            return cls.read(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{file}: {error}") from None

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Float8 | None:
        """From the contents of a ``config.json``.  Raises :class:`UnsupportedModel`."""
        key = next((one for one in CONFIGS if config.get(one) is not None), "")
        if not key:
            return None
        given = config[key]
        if not isinstance(given, Mapping):
            raise UnsupportedModel(f"{key} {given!r}; it is a table")
        method = given.get("quant_method")
        if method == "fp8":
            return cls(_of_fp8(given, key))
        if method == "compressed-tensors":
            return cls(_of_compressed(given, key))
        raise UnsupportedModel(f"{key}.quant_method {method!r}: its codes are not read: {_REMEDY}")

    def scale_name(self, weight: str, names: Mapping[str, Any]) -> str:
        """The name of a float8 matrix's scale, among ``names``.  Raises :class:`UnsupportedModel`."""
        for suffix in _SCALES:
            if weight.endswith("weight") and (name := weight.removesuffix("weight") + suffix) in names:
                return name
        raise UnsupportedModel(
            f"{weight} is float8 and has no scale ({' or '.join(_SCALES)}) beside it: download the model "
            "again"
        )

    def shared(self, name: str, shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of a matrix of ``shape`` that have one number of a scale of shape ``scale``.

        Blocks at the edges may be smaller.  Raises :class:`UnsupportedModel`.
        """
        if len(shape) == 2:
            rows, columns = shape
            if scale in ((), (1,), (1, 1)):
                if self.block is None or (rows <= self.block[0] and columns <= self.block[1]):
                    return rows, columns
            elif self.block is not None:
                if scale == (-(-rows // self.block[0]), -(-columns // self.block[1])):
                    return self.block
            elif scale in ((rows,), (rows, 1)):
                return 1, columns
        per = f"blocks of {list(self.block)}" if self.block else "rows or the whole matrix"
        raise UnsupportedModel(
            f"{name} has shape {list(shape)} and a scale of shape {list(scale)}, which is none for {per}: "
            "correct quantization_config, or download the model again"
        )


def is_scale(name: str) -> bool:
    """Whether a tensor of a float8 checkpoint is a scale: of a weight, or of activations, which only servers
    use.
    """
    return name.endswith(tuple(f".{suffix}" for suffix in (*_SCALES, *_SERVING)))


def _of_fp8(given: Mapping[str, Any], key: str) -> tuple[int, int] | None:
    if (kind := given.get("fmt", "e4m3")) != "e4m3":
        raise UnsupportedModel(f"{key}.fmt {kind!r}; supported: e4m3: {_REMEDY}")
    return _block(given.get("weight_block_size"), f"{key}.weight_block_size")


def _of_compressed(given: Mapping[str, Any], key: str) -> tuple[int, int] | None:
    """Every group must have float8 weights, all of the same blocks if of any."""
    if (kind := given.get("format")) not in ("float-quantized", "naive-quantized"):
        raise UnsupportedModel(f"{key}.format {kind!r}; supported: float-quantized: {_REMEDY}")
    sparsity: Any = given.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise UnsupportedModel(f"{key}.sparsity_config: sparse weights are not read: {_REMEDY}")
    if given.get("transform_config"):
        raise UnsupportedModel(f"{key}.transform_config: rotated weights are not read: {_REMEDY}")
    groups: Mapping[str, Any] = given.get("config_groups") or {}
    blocks = set[tuple[int, int] | None]()
    for name, group in groups.items():
        weights: Any = group.get("weights") or {}
        said = {word: weights.get(word) for word in ("type", "num_bits", "symmetric")}
        wanted = {"type": "float", "num_bits": 8, "symmetric": True}
        if said != wanted or weights.get("strategy") not in ("tensor", "channel", "block"):
            raise UnsupportedModel(
                f"{key}.config_groups.{name}.weights {dict(weights)}; supported: symmetric floats of 8 bits "
                f"by tensor, channel or block: {_REMEDY}"
            )
        blocks.add(_block(weights.get("block_structure"), f"{key}.config_groups.{name}.block_structure"))
    if len(blocks) != 1:
        raise UnsupportedModel(f"{key}.config_groups: no groups, or of several block structures: {_REMEDY}")
    return blocks.pop()


def _block(given: Any, key: str) -> tuple[int, int] | None:
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != 2 or not all(type(n) is int and n > 0 for n in given):
        raise UnsupportedModel(f"{key} {given!r}; it is two whole numbers above 0, rows and columns")
    return given[0], given[1]
