"""Learning rates over a run, and over its supervised warm start."""

from __future__ import annotations

import math

RISE_STEPS = 10
FLOOR = 0.05  # of the peak, where the cosine ends


def learning_rate(step: int, steps: int, peak: float, *, warmup: int, decay: str, end: float) -> float:
    """The rate of optimizer step ``step`` (from 0) of ``steps``.

    It rises linearly over ``warmup`` steps; then it stays at ``peak`` (``decay="constant"``), or falls to
    ``end`` · ``peak`` at the last step and stays there: "linear", or "cosine", by half a cosine.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if decay == "constant":
        return peak
    done = min((step - warmup) / max(steps - 1 - warmup, 1), 1.0)
    left = 1.0 - done if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return peak * (end + (1.0 - end) * left)


def warm_start_lr(step: int, steps: int, peak: float) -> float:
    """Linear rise over ``RISE_STEPS``, then half a cosine from ``peak`` down to ``FLOOR`` of it.

    ``step`` counts from 0 to ``steps`` - 1.  A constant rate would leave a tiny model wherever its last noisy
    step put it, and reinforcement learning would begin from there.
    """
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / RISE_STEPS) * max(FLOOR, cosine)
