"""Proof that an engine holds the weights that were sent to it.

The checksum of a set of tensors is the sum, modulo 2⁶⁴, of one 64-bit BLAKE2b digest per tensor over its
name, dtype, shape and bytes.  A sum does not depend on the order, so a sender adds tensors bucket by bucket
as they leave, and the engine adds what it holds after the swap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

_MODULUS = 1 << 64


def tensor_checksum(name: str, tensor: torch.Tensor) -> int:
    """64-bit digest of one named tensor: name, dtype, shape and contents."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    digest.update(memoryview(data.numpy()))  # pyright: ignore[reportArgumentType]
    return int.from_bytes(digest.digest(), "little")


def combine(checksums: Iterable[int]) -> int:
    """Order-free combination of tensor checksums."""
    return sum(checksums) % _MODULUS


def weights_checksum(tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
    """Checksum of a whole set of named tensors."""
    return combine(tensor_checksum(name, tensor) for name, tensor in tensors)
