"""The last numbers of a stream, in order of size."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque


class Recent:
    """The numbers added last: where another stands among them, and their median."""

    def __init__(self) -> None:
        self._last: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._last)

    def add(self, value: float, window: int) -> None:
        """``value`` (not NaN, which has no place) and the ``window`` - 1 before it stay."""
        self._last.append(value)
        insort(self._sorted, value)
        while len(self._last) > window:
            del self._sorted[bisect_left(self._sorted, self._last.popleft())]

    def rank(self, value: float) -> float:
        """The share of them that is smaller, equal ones for a half each.  There must be one."""
        below, upto = bisect_left(self._sorted, value), bisect_right(self._sorted, value)
        return (below + upto) / (2 * len(self._sorted))

    @property
    def median(self) -> float:
        """There must be one."""
        half, odd = divmod(len(self._sorted), 2)
        return self._sorted[half] if odd else (self._sorted[half - 1] + self._sorted[half]) / 2
