"""A tree's budget: the leaves that it may have, and those that it has begun."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from system.tree.record import Origin


@dataclass(slots=True)
class Budget:
    """``leaves`` n, of which ``roots`` N start together; the others are kept for forks, and what of them can
    no longer be forked starts as fresh roots: roots + forks + top-ups == n at every normal close.
    """

    leaves: int
    roots: int
    started: Counter[Origin] = field(default_factory=Counter[Origin])

    @property
    def remaining(self) -> int:
        """Leaves that no branch has begun."""
        return self.leaves - self.started.total()

    @property
    def kept(self) -> int:
        """Leaves kept for forks at the tree's start."""
        return self.leaves - self.roots

    @property
    def share(self) -> float:
        """Of these, per root: n / N - 1."""
        return self.kept / self.roots
