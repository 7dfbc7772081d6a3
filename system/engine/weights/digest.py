"""The digests that SGLang's ``/weights_checker`` gives, computed at the sender.

On a CPU SGLang takes the first 8 bytes of SHA-256 over a parameter's bytes (``tensor_hash`` in
``managers/mm_utils.py``); on a GPU a position-dependent hash of its 32-bit words (``gpu_tensor_hash``), which
:func:`word_hash` computes with plain tensor operations on any device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from system.engine.checksum import tensor_bytes
from system.engine.weights.layout import Fuser
from system.models.shape import ModelShape

_MASK64 = (1 << 64) - 1
# What SGLang's float8 loader quantises: the matrices of its LinearBase layers.
QUANTISED = tuple(f".{one}_proj.weight" for one in ("q", "k", "v", "o", "gate", "up", "down"))
_SEED = 0x243F6A88
_SEEDS = (_SEED, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
_POSITION = ((0x27D4EB2D, 15), (0x165667B1, 13))  # (multiplier, rotation) of the two 32-bit halves
_TILE_WORDS = 8192
_BATCH_TILES = 512  # tiles hashed at once: bounds the scratch memory


class Digests:
    """What every tensor-parallel rank of one server must report after an update."""

    def __init__(self, shape: ModelShape, tp: int, device: str, quantised: bool = False) -> None:
        """``device``: "cpu" or "cuda", what the server runs on.  ``quantised``: its matrices are float8, made
        there of what is sent; of these every rank reports the digest of what came, whole and under its
        Hugging Face name (our plug-in, ``_tell_given``).
        """
        self._fuser, self._quantised = Fuser(shape, tp, device), quantised
        self._hash = _gpu_hash if device == "cuda" else sha256_hash
        self.ranks: list[dict[str, str]] = [{} for _ in range(tp)]  # parameter -> digest

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if self._quantised and name.endswith(QUANTISED):
                given = f"{self._hash(tensor):016x}"
                for rank in self.ranks:
                    rank[name] = given
                continue
            for parameter, shards in self._fuser.add(name, tensor):
                for rank, shard in enumerate(shards):
                    self.ranks[rank][parameter] = f"{self._hash(shard):016x}"


def sha256_hash(tensor: Tensor) -> int:
    """First 64 bits of SHA-256 over the tensor's bytes."""
    return int.from_bytes(hashlib.sha256(tensor_bytes(tensor)).digest()[:8], "big")


def _gpu_hash(tensor: Tensor) -> int:
    """:func:`word_hash`, on this process's own GPU where it has one."""
    return word_hash(tensor.cuda() if torch.cuda.is_available() else tensor)


def word_hash(tensor: Tensor) -> int:
    """SGLang's hash of a CUDA tensor.

    Each 32-bit word is mixed with its index by MurmurHash3's finaliser, twice with different constants; a
    tile of 8192 words is the sum of its words' hashes, mixed again; the tiles' 64-bit values add up, and
    splitmix64 finishes.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    data = torch.nn.functional.pad(data, (0, -data.numel() % 4))
    words = data.view(torch.int32)
    count = words.numel()
    if count == 0:
        return 0
    total = 0
    step = _TILE_WORDS * _BATCH_TILES
    for start in range(0, count, step):
        total += _tiles(words[start : start + step], start, count)
    return _splitmix64(total)


def _tiles(words: Tensor, start: int, count: int) -> int:
    """Sum of the tiles' hashes of ``words``, which begin at word ``start`` of ``count``."""
    index = torch.arange(start, start + words.numel(), device=words.device, dtype=torch.int64)
    tiles = -(-words.numel() // _TILE_WORDS)
    empty = tiles * _TILE_WORDS - words.numel()
    value = words.to(torch.int64) & 0xFFFFFFFF
    halves = []
    for seed, (multiplier, turn) in zip(_SEEDS, _POSITION, strict=True):
        place = ((index * multiplier + seed) & 0xFFFFFFFF) ^ _rotate(index & 0xFFFFFFFF, turn)
        mixed = torch.nn.functional.pad(_mix(value ^ place), (0, empty)).view(tiles, _TILE_WORDS)
        halves.append(_mix((mixed.sum(1) & 0xFFFFFFFF) ^ ((count * 4) & 0xFFFFFFFF)))
    high, low = (int(half.sum()) for half in halves)
    return ((high << 32) + low) & _MASK64


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser, on 32-bit values held in int64 (a product that overflows wraps)."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _rotate(x: Tensor, bits: int) -> Tensor:
    return ((x << bits) | (x >> (32 - bits))) & 0xFFFFFFFF


def _splitmix64(x: int) -> int:
    x ^= x >> 30
    x = (x * 0xBF58476D1CE4E5B9) & _MASK64
    x ^= x >> 27
    x = (x * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)
