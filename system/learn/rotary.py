"""Rotary position embedding (RoFormer, Su et al., 2021) by explicit positions, in float32 whatever the
model's dtype: cosines in bfloat16 are known to two or three digits.
"""

from __future__ import annotations

import torch

from system.learn import fused


class Rotary:
    """The rotation of one packed row of N tokens, shared by all layers."""

    def __init__(self, position: torch.Tensor, dimensions: int, theta: float) -> None:
        """``position`` ``[N]`` int64; ``dimensions``: of a head; ``theta``: the base of the wavelengths."""
        exponent = torch.arange(0, dimensions, 2, dtype=torch.float32, device=position.device) / dimensions
        angles = position.float()[:, None, None, None] * (1.0 / theta**exponent)
        self.cos, self.sin = angles.cos(), angles.sin()  # [N, 1, 1, d/2] float32

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, 1, heads, d]``, queries or keys, rotated; rounded to their dtype once."""
        return fused.on(x.device, rotate)(x, self.cos, self.sin)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Dimensions i and i + d/2 of a head turn together, as in Hugging Face's models."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
