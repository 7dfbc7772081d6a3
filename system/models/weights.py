"""The weights of a Hugging Face directory as numbers, whatever they are stored as.

The one place that reads them: for the learner, the embedded engine and what is exported.  Float8 weights are
multiplied by their scales in float32 and rounded once, to the dtype that is asked for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from system.models.directory import untied, weight_files
from system.models.float8 import Float8, is_scale
from system.models.reading import UnsupportedModel
from system.models.shape import ModelShape

SAMPLED = 256  # tensors that a fingerprint is made of, a row of each
Box = tuple[slice, ...]  # of a tensor: slices with a start and a stop, of its first dimensions


class WeightReader:
    """Reads tensors, or boxes of them.

    Files are mapped into memory, not loaded: what a box costs is the box.
    """

    def __init__(self, directory: str | Path) -> None:
        """Raises :class:`~system.models.reading.UnsupportedModel` for weights that are not there, or of a
        quantisation that is not read.
        """
        self._directory = Path(directory)
        self._where = weight_files(directory)
        self._float8 = Float8.of_directory(directory)
        self._files: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> Iterator[str]:
        """The tensors, file by file; scales are parts of others."""
        for name in sorted(self._where, key=lambda one: (self._where[one], one)):
            if self._float8 is None or not is_scale(name):
                yield name

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, dtype: torch.dtype, box: Box | None = None) -> Tensor:
        """A tensor, or a box of it, as ``dtype``.

        Raises :class:`~system.models.reading.UnsupportedModel` for a float8 tensor without a scale that fits,
        and for numbers that are not finite: whatever is computed with them would not be, either.
        """
        numbers = self._read(name, dtype, box)
        if not finite(numbers):
            raise UnsupportedModel(
                f"{self._directory}: {name} holds numbers that are not finite (NaN, infinite): the "
                "weights are damaged, or their training failed; take other ones"
            )
        return numbers

    def check_tied(self, shape: ModelShape, dtype: torch.dtype, box: Box | None = None) -> None:
        """Of a tied model whose files hold an output head, too: is it the embedding, or in this box of it?

        Raises :class:`~system.models.reading.UnsupportedModel` otherwise.
        """
        embedding, head = shape.tensor("embedding"), shape.tensor("head")
        if not shape.tied or head not in self:
            return
        same = self.shape(head) == self.shape(embedding)
        if not same or not torch.equal(self.read(head, dtype, box), self.read(embedding, dtype, box)):
            raise UnsupportedModel(f"{self._directory}: {untied(head, embedding)}")

    def _read(self, name: str, dtype: torch.dtype, box: Box | None) -> Tensor:
        stored = self._tensor(name) if box is None else self._slice(name)[box]
        if stored.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            return stored.to(dtype)
        if self._float8 is None or stored.dtype != torch.float8_e4m3fn:
            raise UnsupportedModel(
                f"{self._directory}: {name} holds {stored.dtype}, which config.json's quantization_config "
                "does not explain; take the model's bfloat16 or float32 weights"
            )
        try:
            shape, scale = self.shape(name), self._tensor(self._float8.scale_name(name, self._where))
            shared = self._float8.shared(name, shape, tuple(scale.shape))
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{self._directory}: {error}") from None
        return scaled(stored, scale, shared, box or ()).to(dtype)

    def _slice(self, name: str) -> Any:
        return self._open(name).get_slice(name)

    def _tensor(self, name: str) -> Tensor:
        return self._open(name).get_tensor(name)

    def _open(self, name: str) -> Any:
        file = self._where[name]
        if file not in self._files:
            self._files[file] = safe_open(self._directory / file, framework="pt")
        return self._files[file]


def finite(numbers: Tensor) -> bool:
    """Whether all of them are.  A sum is quick, and none that is finite has another number in it."""
    return math.isfinite(numbers.sum(dtype=torch.float32)) or bool(numbers.isfinite().all())


def fingerprint(directory: str | Path) -> str:
    """16 hexadecimal digits that tell the weights of one model from those of another, by a sample of them.

    Numbers are taken as bfloat16, so a model is the same in any dtype that holds them.  A float8 copy does
    not: quantising changes most numbers, and its weights are those of another model.
    """
    shapes = sorted(ModelShape.from_directory(directory).tensors().items())
    reader, hashed = WeightReader(directory), hashlib.sha256()
    for name, size in shapes[:: -(-len(shapes) // SAMPLED)]:
        rows, *columns = size
        box = (slice(rows // 2, rows // 2 + 1),) if columns else (slice(0, rows),)
        numbers = reader.read(name, torch.bfloat16, box)
        hashed.update(f"{name} {list(size)}".encode())
        hashed.update(numbers.contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]


def scaled(stored: Tensor, scale: Tensor, shared: tuple[int, int], box: Box) -> Tensor:
    """float32 [rows, columns] of a float8 matrix, or of a box of it, ``stored``: each number times its scale.

    ``scale``: of the whole matrix, one number for every block of ``shared`` rows and columns.  ``box``: where
    ``stored`` lies in the matrix; without columns, or empty: from its beginning.
    """
    row, column = (*(part.start or 0 for part in box), 0, 0)[:2]
    rows = torch.arange(row, row + stored.shape[0]) // shared[0]
    columns = torch.arange(column, column + stored.shape[1]) // shared[1]
    grid = scale.float()
    if grid.dim() < 2:
        grid = grid.reshape(-1, 1)
    return stored.float() * grid[rows][:, columns]


def by_size(reader: WeightReader, dtype: torch.dtype) -> Iterator[tuple[str, int]]:
    """The tensors and their bytes as ``dtype``."""
    for name in reader.names():
        yield name, math.prod(reader.shape(name)) * dtype.itemsize
