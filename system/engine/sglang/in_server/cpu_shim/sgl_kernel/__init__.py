"""The few compiled kernels that SGLang cannot do without on a CPU, in plain PyTorch.

With ``SGLANG_USE_CPU_ENGINE=1`` SGLang takes its own ``forward_native`` for every layer as long as
``torch.ops.sgl_kernel.convert_weight_packed`` does not exist, so only book-keeping needs a body here.
"""

import torch

__version__ = "0.4.10"


def assign_req_to_token_pool_cpu(
    req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len=None
):
    """Write the new cache slots of every request, end to end in ``out_cache_loc``, into its row."""
    at = 0
    for row, start, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True
    ):
        req_to_token[row, start:end] = out_cache_loc[at : at + end - start].to(req_to_token.dtype)
        at += end - start


def __getattr__(name):
    """Kernels of features that are not used here, such as speculative decoding: importable, not callable."""
    if not name.endswith("_cpu"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"{name} has no stand-in for CPU: it needs SGLang's compiled kernels")

    return missing


_library = torch.library.Library("sgl_kernel", "DEF")
_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")

_WORD = 0xFFFFFFFF


def _rotate(x, bits):
    return ((x << bits) | (x >> (32 - bits))) & _WORD


def _murmur_hash32(seed, positions, col_indices):
    """[rows, columns] MurmurHash3 (32 bit) of (low and high word of the seed, position, column).

    The randomness of seeded sampling under ``--enable-deterministic-inference``.
    """
    seed = seed.to(torch.int64)[:, None]
    words = (
        seed & _WORD,
        (seed >> 32) & _WORD,
        positions.to(torch.int64)[:, None] & _WORD,
        col_indices.to(torch.int64)[None] & _WORD,
    )
    h = torch.zeros(1, 1, dtype=torch.int64)
    for word in words:
        h = h ^ ((_rotate((word * 0xCC9E2D51) & _WORD, 15) * 0x1B873593) & _WORD)
        h = (_rotate(h, 13) * 5 + 0xE6546B64) & _WORD
    h = h ^ 16  # bytes hashed
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = ((h ^ (h >> shift)) * factor) & _WORD
    return (h ^ (h >> 16)).to(torch.uint32)


_library.impl("murmur_hash32_cpu", _murmur_hash32, "CPU")
