"""The files of a model in Hugging Face format, and the number formats that weights may have."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from system.models.directory import INDEX

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # by the name that a configuration uses


def write_weights(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file.  Raises OSError, of which the library gives but the text."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(file)) from None


def write_index(directory: Path, where: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of weights that lie in several files; ``where``: as :func:`.directory.weight_files`."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": where}
    (directory / INDEX).write_text(json.dumps(index, indent=2))
