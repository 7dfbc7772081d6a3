"""From rows and their lengths to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from system.engine.embedded.model import Batch, KVSegment

# Prompts are padded to a common width for attention only; small paddings are not worth a separate kernel
# call.
_FREE_PADDING = 256


class RowSlice:
    """Positions ``start[i] .. stop[i]`` of row i in a contiguous range of rows, computed together."""

    __slots__ = ("even", "keys", "padded", "positions", "row_of", "rows", "start", "width", "widths")

    def __init__(self, first_row: int, start: NDArray[np.int64], stop: NDArray[np.int64]):
        self.rows = np.arange(first_row, first_row + start.size)
        self.start = start
        self.keys = int(stop.max())
        self.widths = widths = stop - start
        self.width = width = int(widths.max())
        self.even = bool((widths == width).all())
        if width == 1:
            self.positions, self.row_of, self.padded = start, self.rows, self.rows
            return
        offsets = np.arange(widths.sum()) - np.repeat(np.cumsum(widths) - widths, widths)
        self.positions = np.repeat(start, widths) + offsets
        self.row_of = np.repeat(self.rows, widths)
        self.padded = np.repeat(np.arange(self.rows.size) * width, widths) + offsets


class Batcher:
    """Packs pieces into one token axis, with positions, KV places and attention masks."""

    def __init__(self, context: int, kv_heads: int, dtype: torch.dtype, device: torch.device):
        self._context, self._device = context, device
        self._heads = np.arange(2 * kv_heads) * context
        # A query's mask is a window of these zeros and -inf; the later its position, the earlier it begins.
        line = torch.zeros(2 * context - 1, dtype=dtype, device=device)
        line[context:] = -torch.inf
        self._windows = line.as_strided((context, context), (1, 1))

    def pack(
        self,
        tokens: NDArray[np.int32],
        decoding: NDArray[np.int64],
        runs: Sequence[tuple[int, int]],
        pieces: Sequence[RowSlice] = (),
        adapted: Tensor | None = None,
    ) -> Batch:
        """``tokens [rows, context]`` holds every row's tokens.  The first rows, of ``decoding [n]`` tokens,
        compute their last token each, attending in ``runs``; then come the pieces.  ``adapted``
        ``[rows, K]``: each row's adapters (:meth:`AdapterStack.mask`).
        """
        n = decoding.size
        positions = np.concatenate([decoding - 1, *(piece.positions for piece in pieces)])
        rows = np.concatenate([np.arange(n), *(piece.row_of for piece in pieces)])
        last = None
        if any(piece.width > 1 for piece in pieces):
            widths = np.concatenate([np.ones(n, np.int64), *(piece.widths for piece in pieces)])
            last = np.cumsum(widths) - 1
        segments, offset = self._decoding(decoding, runs), n
        for piece in pieces:
            segments.append(self._segment(piece, offset))
            offset += piece.positions.size
        own = rows * (self._heads.size * self._context) + positions  # of the first head
        return Batch(
            tokens=self._put(tokens[rows, positions].astype(np.int64)),
            positions=self._put(positions),
            places=self._put(rows * self._context + positions),
            heads=self._put((own[:, None] + self._heads).ravel()),
            segments=tuple(segments),
            last=None if last is None else self._put(last),
            adapted=None if adapted is None else adapted[torch.from_numpy(rows)].to(self._windows),
        )

    def _decoding(self, length: NDArray[np.int64], runs: Sequence[tuple[int, int]]) -> list[KVSegment]:
        """Segments of rows that compute their last token; they share one mask."""
        if not length.size:
            return []
        mask = self._mask(length[:, None] - 1, int(length.max()))
        segments = []
        for first, last in runs:
            keys = int(length[first:last].max())
            own = mask[first:last, ..., :keys]
            segments.append(KVSegment(first, last, first, last - first, 1, keys, None, own))
        return segments

    def _segment(self, piece: RowSlice, offset: int) -> KVSegment:
        width = piece.width
        query = piece.start[:, None]
        if width > 1:  # positions of the (padded) queries
            query = np.minimum(query + np.arange(width), self._context - 1)
        return KVSegment(
            start=offset,
            stop=offset + piece.positions.size,
            first_row=int(piece.rows[0]),
            rows=piece.rows.size,
            width=width,
            keys=piece.keys,
            scatter=None if piece.even else self._put(piece.padded),
            mask=self._mask(query, piece.keys),
        )

    def _mask(self, query: NDArray[np.int64], keys: int) -> Tensor:
        """Additive mask of queries at positions ``query [rows, width]`` over the first ``keys``."""
        begin = self._put(self._context - 1 - query.ravel())
        return self._windows[:, :keys].index_select(0, begin).view(-1, 1, query.shape[1], keys)

    def _put(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def similar_widths(widths: Sequence[int]) -> list[tuple[int, int]]:
    """Cut descending ``widths`` into runs ``(first, last)`` in which padding to the widest costs little."""
    runs, last = [], len(widths)
    for index in reversed(range(len(widths))):
        width = widths[index]
        if width > 2 * widths[last - 1] and width * (last - index) > _FREE_PADDING:
            runs.append((index + 1, last))
            last = index + 1
    return [(0, last), *reversed(runs)] if widths else []
