"""Run megatron-core on a machine without CUDA.  Everything here does nothing when CUDA is present.

megatron-core 0.16 trains on CPU tensors over gloo except where it names CUDA outright.  Those places are of
two kinds:

* module-level calls (``torch.cuda.current_device()``, ``torch.cuda.synchronize()``, the CUDA RNG state used
  by activation recomputation): :func:`install` replaces them once per process;
* literals (``device="cuda"``, ``.cuda()``, ``tensor.type() == "torch.cuda.FloatTensor"``) in model
  construction, DDP, the optimizer, gradient clipping and checkpoints: :func:`scope` is a torch-function mode
  around exactly those calls. It costs about 2.5 µs per operation, so forward and backward passes stay outside
  it.

No Megatron file is edited.  Because :func:`install` changes ``torch.cuda``, call it only in learner
processes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _CudaLiterals(TorchFunctionMode):
    """Read every mention of CUDA as a mention of the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and isinstance(result, str):
            # Megatron checks dtypes by type name: 'torch.FloatTensor' must read 'torch.cuda.FloatTensor'.
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def needed() -> bool:
    """Whether this process has no CUDA device."""
    return not torch.cuda.is_available()


def scope() -> contextlib.AbstractContextManager[Any]:
    """Enter around Megatron calls that name CUDA (build, DDP, optimizer, clipping, checkpoint)."""
    return _CudaLiterals() if needed() else contextlib.nullcontext()


@contextlib.contextmanager
def quick_import() -> Generator[None]:
    """Around the first import of Megatron, of which this saves more than half.

    Megatron decorates fused kernels, which we have off (``system/learn/model.py``), with ``torch.compile``,
    which loads TorchInductor at once: without CUDA it is kept from that.  And its inference engine imports
    W&B, which leaves temporary directories behind when its process is killed.
    """
    modules: dict[str, Any] = sys.modules
    compiler = torch.compile
    modules.setdefault("wandb", None)  # "there is no such module"
    if needed():
        torch.compile = lambda model=None, **_: model or (lambda function: function)
    yield
    torch.compile = compiler
    if modules.get("wandb", "") is None:
        del modules["wandb"]


def install() -> None:
    """Replace Megatron's module-level CUDA calls in this process; idempotent."""
    if not needed():
        return
    from megatron.core.tensor_parallel import random as megatron_random

    replacements: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
        (torch.cuda, "synchronize", lambda *_: None),
        (megatron_random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
        (megatron_random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state)),
    )
    for module, name, replacement in replacements:
        setattr(module, name, replacement)
