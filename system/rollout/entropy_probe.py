"""The streaming entropy probe: the first k token entropies of a model segment, as they arrive."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class EntropyProbe:
    """Collects at most ``window`` entropies (nats; NaN where the engine knows none) from a stream of chunks.

    It costs no token and no forward pass: sampled tokens carry their entropies.  ``full`` turns true with
    the chunk that brings token number ``window``; later tokens are ignored.  A segment may end earlier, by a
    stop or at the token budget; then :meth:`values` is what there is, and the decision rests on that.
    """

    def __init__(self, window: int) -> None:
        self._values = np.empty(window, np.float32)
        self._count = 0

    def add(self, entropies: NDArray[np.float32]) -> None:
        """``entropies``: [m] of the next m tokens."""
        taken = entropies[: self._values.size - self._count]
        self._values[self._count : self._count + taken.size] = taken
        self._count += taken.size

    @property
    def full(self) -> bool:
        return self._count == self._values.size

    @property
    def values(self) -> NDArray[np.float32]:
        """[≤ window] what was collected so far."""
        return self._values[: self._count]
