"""Turning the queries and keys of a packed row by explicit positions (:mod:`system.models.rope`), in float32
whatever the model's dtype: cosines in bfloat16 are known to two or three digits.
"""

from __future__ import annotations

import torch

from system.learn import fused
from system.models.rope import turns


class Rotary:
    """The rotation of one packed row of N tokens, shared by all layers."""

    def __init__(self, position: torch.Tensor, frequencies: torch.Tensor, scale: float = 1.0) -> None:
        """``position`` ``[N]`` int64; ``frequencies`` ``[d/2]`` float32; ``scale``: of cosines and sines."""
        cos, sin = turns(frequencies, scale, position)
        self.cos, self.sin = cos[:, None, None], sin[:, None, None]  # [N, 1, 1, d/2] float32

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, 1, heads, d]``, queries or keys, rotated; rounded to their dtype once."""
        return fused.on(x.device, rotate)(x, self.cos, self.sin)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Dimensions i and i + d/2 of a head turn together, as in Hugging Face's models."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
