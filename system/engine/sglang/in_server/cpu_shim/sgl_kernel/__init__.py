"""The one compiled kernel that SGLang cannot do without on a CPU, in plain PyTorch.

With ``SGLANG_USE_CPU_ENGINE=1`` SGLang takes its own ``forward_native`` for every layer as long as
``torch.ops.sgl_kernel.convert_weight_packed`` does not exist, so only book-keeping needs a body here.
"""

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
