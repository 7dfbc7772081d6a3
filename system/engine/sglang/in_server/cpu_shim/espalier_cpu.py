"""Pinned memory without a GPU is plain memory.

SGLang's layers with adapters (LoRA) keep small tensors in pinned memory, for copies to a GPU that do not
wait, and ask for it whatever the device; PyTorch refuses that where there is no CUDA.  Nothing is copied
here, so the same tensor unpinned is what is wanted.

SGLang loads it by its entry point in the group ``sglang.srt.plugins``, in each of its processes.
"""

import importlib

import torch

MODULES = (
    "layers",
    "backend.torch_backend",
)  # of sglang.srt.lora, as far as --lora-backend torch_native goes


class Unpinned:
    """``torch``, whose ``tensor`` and ``zeros`` pin nothing."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def tensor(*args, pin_memory=False, **kwargs):
        return torch.tensor(*args, **kwargs)

    @staticmethod
    def zeros(*args, pin_memory=False, **kwargs):
        return torch.zeros(*args, **kwargs)


def register():
    """Called by SGLang in each of its processes."""
    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    for name in MODULES:
        importlib.import_module(f"sglang.srt.lora.{name}").torch = Unpinned()
