"""The files of a model in Hugging Face format, and the number formats that weights may have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from system.models.shape import UnsupportedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # by the name that a configuration uses
INDEX = "model.safetensors.index.json"  # which file holds which tensor, where there are several
SINGLE = "model.safetensors"


def weight_files(directory: str | Path) -> dict[str, str]:
    """Tensor name -> name of the file that holds it.

    Raises :class:`~system.models.shape.UnsupportedModel` when there are no safetensors weights, or not all.
    """
    root = Path(directory)
    if (root / INDEX).is_file():
        where: dict[str, str] = json.loads((root / INDEX).read_text())["weight_map"]
    elif (root / SINGLE).is_file():
        with safe_open(root / SINGLE, framework="pt") as file:
            where = dict.fromkeys(file.keys(), SINGLE)
    else:
        raise UnsupportedModel(f"{root}: no safetensors weights ({SINGLE} or {INDEX})")
    for name in sorted(set(where.values())):
        if not (root / name).is_file():
            raise UnsupportedModel(f"{root / name} is missing: {INDEX} names it")
    return where


def write_index(directory: Path, where: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of weights that lie in several files; ``where`` as of :func:`weight_files`."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": where}
    (directory / INDEX).write_text(json.dumps(index, indent=2))
