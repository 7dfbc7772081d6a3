"""How long a simulated tool takes: lognormal, with stragglers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from system.twin.dist import Dist, Lognormal, Stragglers


@dataclass(frozen=True)
class ToolLatency:
    """Seconds of a tool call: lognormal around ``mean_s``, some calls ``straggler_factor`` times as long.

    The *mean* without stragglers is the same for every ``sigma``: what changes is the spread, not the amount
    of waiting.  ``sigma`` 0 is constant.
    """

    mean_s: float = 1.0
    sigma: float = 0.0  # of ln(seconds)
    stragglers: float = 0.0  # share of the calls
    straggler_factor: float = 30.0

    @property
    def dist(self) -> Dist:
        base = Lognormal(self.mean_s, self.sigma)
        return Stragglers(base, self.stragglers, self.straggler_factor) if self.stragglers else base

    def draw(self, seed: int) -> float:
        """Latency of the call that ``seed`` names: the same whoever makes it, and when."""
        return self.dist.draw(np.random.default_rng(seed))

    def __str__(self) -> str:
        spread = f"σ = {self.sigma:g}" if self.sigma else "constant"
        late = f", {self.stragglers:.0%} × {self.straggler_factor:g}" if self.stragglers else ""
        return spread + late
