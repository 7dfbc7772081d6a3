"""Bytes, seconds and counts in words."""

from __future__ import annotations

from system.plan.hardware import GIB


def byte_size(count: float) -> str:
    """Bytes, in the unit that shows them: 3.1 GiB, 984 KiB; negative ones are missing."""
    for unit, name in ((GIB, "GiB"), (2.0**20, "MiB")):
        if abs(count) >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1024:.0f} KiB"


def duration(seconds: float) -> str:
    """``1.54`` -> ``1.5 s``, ``0.0213`` -> ``21 ms``."""
    if seconds >= 0.1:
        return f"{seconds:.1f} s"
    return f"{1e3 * seconds:.0f} ms" if seconds >= 1e-3 else "less than 1 ms"


def parameter_count(count: float) -> str:
    """``14.8e9`` -> ``14.8 billion``."""
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:,.0f}"


def count(number: int, what: str) -> str:
    """``2, "GPU"`` -> ``2 GPUs``."""
    return f"{number} {what}{'s' * (number != 1)}"
