"""Learning rates over a supervised warm start."""

from __future__ import annotations

import math

RISE_STEPS = 10
FLOOR = 0.05  # of the peak, where the cosine ends


def warm_start_lr(step: int, steps: int, peak: float) -> float:
    """Linear rise over ``RISE_STEPS``, then half a cosine from ``peak`` down to ``FLOOR`` of it.

    ``step`` counts from 0 to ``steps`` - 1.  A constant rate would leave a tiny model wherever its last noisy
    step put it, and reinforcement learning would begin from there.
    """
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / RISE_STEPS) * max(FLOOR, cosine)
