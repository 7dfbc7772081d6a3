"""The model of a checkpoint as Hugging Face files, by one process that needs neither the model nor a GPU.

A checkpoint names its tensors as Hugging Face does, so they are read file by file as they will be written.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as read_boxes

from system.errors import CheckpointError, naming
from system.learn.checkpoint import BoxLoader, look, whole
from system.models.adapter import Adapter, factors
from system.models.files import by_bytes, read_tensors, take_name, write_model
from system.models.shape import ModelShape

FILE_BYTES = 2**31  # of one file of weights, at most (one tensor at least)


def extract(
    checkpoint: Path,
    source: str | Path,
    target: Path,
    dtype: torch.dtype,
    *,
    adapter: Adapter | None = None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write the model of ``checkpoint`` into ``target`` as a complete Hugging Face directory.

    ``source``: the model that training began with, which has its configuration and tokenizer.  With an
    ``adapter`` the checkpoint has adapters alone, which are merged into the weights of ``source``.  In memory
    there is one file at a time.  Raises :class:`CheckpointError` for a checkpoint that is damaged, or of
    another model.
    """
    _sound(checkpoint)
    shape = ModelShape.from_directory(source)
    shapes = shape.tensors()
    files = by_bytes(((name, prod(size) * dtype.itemsize) for name, size in shapes.items()), file_bytes)

    def bucket(names: list[str]) -> dict[str, torch.Tensor]:
        if adapter is None:
            return _read(checkpoint, {name: shapes[name] for name in names}, dtype)
        sizes = adapter.tensors(shape)
        beside = {one: sizes[one] for name in names for one in factors(name) if one in sizes}
        return adapter.merged(read_tensors(source, names, dtype), _read(checkpoint, beside, dtype))

    write_model(target, source, dtype, map(bucket, files), len(files))


def extract_adapters(
    checkpoint: Path, source: str | Path, target: Path, dtype: torch.dtype, adapter: Adapter
) -> None:
    """Write the adapters of ``checkpoint`` into ``target`` in PEFT's format; raises as :func:`extract`."""
    _sound(checkpoint)
    shape = ModelShape.from_directory(source)
    tensors = _read(checkpoint, adapter.tensors(shape), dtype)
    partial = target.with_name(target.name + ".partial")
    with naming(partial):
        adapter.write(partial, shape, tensors, str(Path(source).absolute()))
        take_name(partial, target)


def _sound(checkpoint: Path) -> None:
    _, problems = look(checkpoint)
    if problems:
        raise CheckpointError(f"{checkpoint}: {problems[0]}")


def _read(
    checkpoint: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    boxes = [whole(f"parameter/{name}", tensor) for name, tensor in tensors.items()]
    reader = FileSystemReader(checkpoint)
    planner = BoxLoader(boxes, reader.read_metadata())
    if planner.problems:
        raise CheckpointError(f"{checkpoint}: {planner.problems[0]}")
    try:
        read_boxes({}, storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as error:  # no Exception
        cause, _ = next(iter(error.failures.values()))
        raise CheckpointError(f"{checkpoint}: it cannot be read: {cause}") from error
    return tensors
