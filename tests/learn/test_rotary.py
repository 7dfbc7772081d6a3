"""Rotary embedding against its definition in float64."""

from __future__ import annotations

import pytest
import torch

from system.learn.rotary import Rotary
from system.models.rope import Rope


def by_definition(x: torch.Tensor, position: torch.Tensor, theta: float) -> torch.Tensor:
    """Each pair (i, i + d/2) as a complex number, times e^(i·angle)."""
    n, d = x.size(0), x.size(-1)
    angle = position.double()[:, None] / theta ** (torch.arange(0, d, 2).double() / d)
    turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle).view(
        n, 1, 1, -1
    )
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_their_gradient_are_turned_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    position = torch.tensor([0, 1, 7, 7, 300, 4000])
    x, weight = (torch.randn(6, 1, 3, 64, generator=generator).to(dtype) for _ in range(2))
    x.requires_grad_()
    turned = Rotary(position, Rope(1e6).frequencies(64))(x)
    turned.backward(weight)
    assert x.grad is not None
    exact, back = by_definition(x.detach(), position, 1e6), by_definition(weight, -position, 1e6)
    for found, expected in ((turned, exact), (x.grad, back)):
        assert found.dtype == dtype
        assert float((found - expected).abs().max()) < (0.02 if dtype == torch.bfloat16 else 1e-3)
        if dtype == torch.bfloat16:  # rounded once: with cosines in bfloat16 a third would be equal
            assert float((found == expected.to(dtype)).float().mean()) > 0.97
