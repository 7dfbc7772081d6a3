"""From rows and their lengths to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from system.engine.embedded.model import Batch, Segment

# Prompts are padded to a common width for attention only; small paddings are not worth a separate kernel
# call.
_FREE_PADDING = 256
# Decoding rows are cut into runs of this many where that saves more keys than another kernel call costs.
_RUN, _CALL_COST = 16, 512


class Piece:
    """Positions ``start[i] .. stop[i]`` of row i in a contiguous range of rows, computed together."""

    __slots__ = ("even", "keys", "padded", "positions", "row_of", "rows", "start", "widths")

    def __init__(self, first_row: int, start: NDArray[np.int64], stop: NDArray[np.int64]):
        self.rows = np.arange(first_row, first_row + start.size)
        self.start = start
        self.keys = int(stop.max())
        self.widths = widths = stop - start
        width = self.width
        self.even = bool((widths == width).all())
        if width == 1:
            self.positions, self.row_of, self.padded = start, self.rows, self.rows
            return
        offsets = np.arange(widths.sum()) - np.repeat(np.cumsum(widths) - widths, widths)
        self.positions = np.repeat(start, widths) + offsets
        self.row_of = np.repeat(self.rows, widths)
        self.padded = np.repeat(np.arange(self.rows.size) * width, widths) + offsets

    @property
    def width(self) -> int:
        return int(self.widths.max())


class Batcher:
    """Packs pieces into one token axis, with positions, KV places and attention masks."""

    def __init__(self, context: int, dtype: torch.dtype, device: torch.device):
        self._context, self._device = context, device
        self._steps = torch.arange(context, device=device)
        self._open = torch.zeros((), dtype=dtype, device=device)
        self._closed = torch.full((), -torch.inf, dtype=dtype, device=device)

    def pack(self, tokens: NDArray[np.int32], pieces: Sequence[Piece], logits: bool = True) -> Batch:
        """``tokens [rows, context]`` holds every row's tokens.  Without ``logits`` only one row gets any."""
        if len(pieces) == 1:
            positions, rows = pieces[0].positions, pieces[0].row_of
        else:
            positions = np.concatenate([piece.positions for piece in pieces])
            rows = np.concatenate([piece.row_of for piece in pieces])
        last = None
        if not logits:
            last = np.array([positions.size - 1])
        elif pieces[-1].width > 1:
            last = np.cumsum(np.concatenate([piece.widths for piece in pieces])) - 1
        segments, offset = [], 0
        for piece in pieces:
            segments.append(self._segment(piece, offset))
            offset += piece.positions.size
        return Batch(
            tokens=self._put(tokens[rows, positions].astype(np.int64)),
            positions=self._put(positions),
            places=self._put(rows * self._context + positions),
            segments=tuple(segments),
            last=None if last is None else self._put(last),
        )

    def _segment(self, piece: Piece, offset: int) -> Segment:
        width = piece.width
        query = piece.start[:, None, None, None]
        if width > 1:  # positions of the (padded) queries
            query = query + np.arange(width)[:, None]
        return Segment(
            start=offset,
            stop=offset + piece.positions.size,
            first_row=int(piece.rows[0]),
            rows=piece.rows.size,
            width=width,
            keys=piece.keys,
            scatter=None if piece.even else self._put(piece.padded),
            mask=torch.where(self._steps[: piece.keys] > self._put(query), self._closed, self._open),
        )

    def _put(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def split_decoding(length: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Cut decoding rows of ``length [n]`` tokens into runs ``(first, last)`` of about equal length.

    Attention over a segment reads as many keys for every row as its longest row has.  Rows cannot be sorted
    without moving their keys, but prompts that were admitted together stand in order of length, so runs often
    pay.
    """
    n = length.size
    runs = max(n // _RUN, 1)
    if runs > 1:
        edges = np.arange(runs) * _RUN
        longest = np.maximum.reduceat(length, edges)
        rows = np.diff(np.append(edges, n))
        if int((longest * rows).sum()) + _CALL_COST * (runs - 1) < int(length.max()) * n:
            return list(zip(edges.tolist(), [*edges[1:].tolist(), n], strict=True))
    return [(0, n)]


def similar_widths(widths: Sequence[int]) -> list[tuple[int, int]]:
    """Cut ascending ``widths`` into runs ``(first, last)`` in which padding to the widest costs little."""
    runs, first = [], 0
    for index, width in enumerate(widths):
        if width > 2 * widths[first] and width * (index - first + 1) > _FREE_PADDING:
            runs.append((first, index))
            first = index
    return [*runs, (first, len(widths))] if widths else []
