"""Chains of elementwise operations as one kernel on a GPU, and as they are written on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

Elementwise = Callable[..., torch.Tensor]


def on(device: torch.device, function: Elementwise) -> Elementwise:
    """``function``, compiled once for all lengths where ``device`` is a GPU."""
    return _compiled(function) if device.type == "cuda" else function


@cache
def _compiled(function: Elementwise) -> Elementwise:
    return torch.compile(function, dynamic=True)
