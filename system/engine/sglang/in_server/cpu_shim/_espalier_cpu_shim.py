"""A plug-in of SGLang that opens two features on a CPU which it keeps to GPUs for their kernels alone."""


def register():
    """Called by SGLang in each of its processes."""
    import torch

    if torch.cuda.is_available():
        return
    # --enable-deterministic-inference (a request's own sampling seed): PyTorch's attention is invariant to
    # the batch as it is here, and the batch-invariant Triton kernels have nothing to replace.
    import sglang.srt.batch_invariant_ops as batch_invariant
    from sglang.srt.arg_groups import choices

    batch_invariant.enable_batch_invariant_mode = lambda *args, **kwargs: None
    choices.add_deterministic_attention_backend_choices(["torch_native"])
    choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    # --enable-return-routed-experts: a host buffer that need not be pinned for a device.
    from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS

    def allocate(dims, dtype, device, pin_memory, allocator, *args, **kwargs):
        return allocator.allocate(dims, dtype=dtype, device=device)

    ALLOC_MEMORY_FUNCS["cpu"] = allocate
