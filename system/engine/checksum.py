"""Proof that an engine holds the weights that were sent to it.

The checksum of a set of tensors is the sum, modulo 2⁶⁴, of one 64-bit BLAKE2b digest per tensor over its
name, dtype, shape and bytes.  A sum does not depend on the order, so a sender adds tensors bucket by bucket
as they leave, and the engine adds what it holds after the swap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch


def weights_checksum(tensors: Iterable[tuple[str, torch.Tensor]], before: int = 0) -> int:
    """Checksum of a set of named tensors, together with those whose checksum was ``before``."""
    total = before
    for name, tensor in tensors:
        digest = hashlib.blake2b(digest_size=8)
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor_bytes(tensor))
        total += int.from_bytes(digest.digest(), "little")
    return total % (1 << 64)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """What a tensor holds, on any device, in its own number format."""
    data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return memoryview(data.numpy())  # pyright: ignore[reportArgumentType]
