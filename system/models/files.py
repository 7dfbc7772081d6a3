"""The files of a model in Hugging Face format, and the number formats that weights may have."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from system.errors import ConfigError
from system.models.directory import INDEX, SINGLE
from system.models.float8 import CONFIGS
from system.models.weights import WeightReader, by_size
from system.whole import appearing

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # by the name that a configuration uses


def by_bytes(things: Iterable[tuple[T, int]], most: int) -> list[list[T]]:
    """What each file (or bucket) holds, in order: things with their bytes, up to ``most``, or one alone."""
    files: list[list[T]] = [[]]
    filled = 0
    for thing, size in things:
        if filled and filled + size > most:
            files.append([])
            filled = 0
        files[-1].append(thing)
        filled += size
    return files


def read_tensors(directory: str | Path, names: Iterable[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Some tensors of a Hugging Face directory, as ``dtype``.  Raises ConfigError for one that is missing."""
    reader, found = WeightReader(directory), dict[str, torch.Tensor]()
    for name in names:
        if name not in reader:
            raise ConfigError(f"{directory}: the weights lack {name}")
        found[name] = reader.read(name, dtype)
    return found


def write_weights(tensors: dict[str, torch.Tensor], file: Path, **metadata: str) -> None:
    """Write a safetensors file.  Raises OSError, of which the library gives but the text."""
    try:
        save_file(tensors, file, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(file)) from None


def write_index(directory: Path, where: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of weights that lie in several files; ``where``: as :func:`.directory.weight_files`."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": where}
    (directory / INDEX).write_text(json.dumps(index, indent=2))


def write_model(
    path: Path,
    source: str | Path,
    dtype: torch.dtype,
    buckets: Iterable[dict[str, torch.Tensor]],
    count: int,
) -> None:
    """Write a complete Hugging Face directory: each of ``count`` buckets is a file of weights.

    Configuration, tokenizer and chat template are copied from ``source``.  The directory appears under its
    name only when complete, and replaces an older one.  Weights are numbers here, so the configuration no
    longer says that they are quantised.
    """
    with appearing(path) as partial:
        for file in Path(source).iterdir():
            if file.suffix in (".json", ".txt", ".model", ".jinja") and file.name != INDEX:
                shutil.copy(file, partial)
        config: dict[str, Any] = json.loads((partial / "config.json").read_text())
        for name in ("torch_dtype", *CONFIGS):  # the first is an older name of dtype
            config.pop(name, None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        where: dict[str, str] = {}
        total = 0
        for number, bucket in enumerate(buckets, 1):
            name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            write_weights(bucket, partial / name)
            where |= dict.fromkeys(bucket, name)
            total += sum(tensor.nbytes for tensor in bucket.values())
            bucket.clear()  # before the next one is made
        if count > 1:
            write_index(partial, where, total)


def dequantise(source: str | Path, target: Path, dtype: torch.dtype, *, file_bytes: int = 2**31) -> None:
    """Write the float8 model in ``source`` with weights of ``dtype``, one file of ``file_bytes`` at a time in
    memory.  Raises :class:`~system.models.reading.UnsupportedModel`.
    """
    reader = WeightReader(source)
    files = by_bytes(by_size(reader, dtype), file_bytes)
    buckets = ({name: reader.read(name, dtype) for name in names} for names in files)
    write_model(target, source, dtype, buckets, len(files))
