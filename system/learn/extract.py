"""The model of a checkpoint as Hugging Face files, by one process that needs neither the model nor a GPU.

A checkpoint names its tensors as Hugging Face does, so they are read file by file as they will be written.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as read_boxes

from system.errors import CheckpointError
from system.learn.checkpoint import BoxLoader, look, whole
from system.models.adapter import Adapter, Rounding, factors, read_adapter
from system.models.files import by_bytes, read_tensors, write_model
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
) -> float | None:
    """Write the model of ``checkpoint`` into ``target`` as a complete Hugging Face directory.

    ``source``: the model that training began with, which has its configuration and tokenizer.  With an
    ``adapter`` the checkpoint has adapters alone, which are merged into the weights of ``source``; returns
    the share of their change that was kept (``Rounding.kept``).  In memory there is one file at a time.
    Raises :class:`CheckpointError` for a checkpoint that is damaged, or of another model.
    """
    _sound(checkpoint)
    if adapter is not None:
        sizes = adapter.tensors(ModelShape.from_directory(source))

        def read(names: list[str]) -> dict[str, torch.Tensor]:
            return _read(checkpoint, {name: sizes[name] for name in names}, dtype)

        return _merge(read, source, target, dtype, adapter, file_bytes)
    shapes, files = _files(source, dtype, file_bytes)
    buckets = (_read(checkpoint, {name: shapes[name] for name in names}, dtype) for names in files)
    write_model(target, source, dtype, buckets, len(files))
    return None


def merge(
    adapters: Path,
    source: str | Path,
    target: Path,
    dtype: torch.dtype,
    adapter: Adapter,
    *,
    file_bytes: int = FILE_BYTES,
) -> float | None:
    """Write the model in ``source`` with the adapters of the directory ``adapters`` merged in; else as
    :func:`extract`.  Raises :class:`~system.models.adapter.AdapterError` for others than ``adapter``.
    """
    tensors = read_adapter(adapters, ModelShape.from_directory(source), adapter, source)

    def read(names: list[str]) -> dict[str, torch.Tensor]:
        return {name: tensors[name] for name in names}

    return _merge(read, source, target, dtype, adapter, file_bytes)


def _merge(
    read: Callable[[list[str]], dict[str, torch.Tensor]],
    source: str | Path,
    target: Path,
    dtype: torch.dtype,
    adapter: Adapter,
    file_bytes: int,
) -> float | None:
    """``read`` gives adapter tensors by their names."""
    _, files = _files(source, dtype, file_bytes)
    sizes, rounding = adapter.tensors(ModelShape.from_directory(source)), Rounding()

    def bucket(names: list[str]) -> dict[str, torch.Tensor]:
        beside = read([one for name in names for one in factors(name) if one in sizes])
        return adapter.merged(read_tensors(source, names, dtype), beside, rounding)

    write_model(target, source, dtype, map(bucket, files), len(files))
    return rounding.kept


def _files(
    source: str | Path, dtype: torch.dtype, file_bytes: int
) -> tuple[dict[str, tuple[int, ...]], list[list[str]]]:
    """The shapes of a model's tensors, and which of them are in each file."""
    shapes = ModelShape.from_directory(source).tensors()
    sizes = ((name, prod(size) * dtype.itemsize) for name, size in shapes.items())
    return shapes, by_bytes(sizes, file_bytes)


def extract_adapters(
    checkpoint: Path, source: str | Path, target: Path, dtype: torch.dtype, adapter: Adapter, base: str
) -> None:
    """Write the adapters of ``checkpoint`` into ``target`` in PEFT's format, as those of the model that is
    called ``base``; raises as :func:`extract`.
    """
    _sound(checkpoint)
    shape = ModelShape.from_directory(source)
    tensors = _read(checkpoint, adapter.tensors(shape), dtype)
    adapter.write(target, tensors, base, source)


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
