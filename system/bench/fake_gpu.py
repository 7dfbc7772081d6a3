"""A learner rank on fake tensors: the real model, optimizer and step at real shapes, without memory or a GPU.

What a GPU computes in one fused kernel is imitated by what that kernel keeps for the backward pass; all else
is the learner's own code.  :class:`Meter` counts the bytes of all storages that are alive.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Generator
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Bytes of the storages made under it: ``now``, and their ``peak`` since :meth:`restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self._calls += 1
        if self._calls % 10 == 0:
            self.sweep()
        return result

    def restart(self) -> None:
        """The peak begins at what is alive."""
        gc.collect()
        self.sweep()
        self.peak = self.now

    def sweep(self) -> None:
        """Notice storages that were resized: recomputation empties what it will make again."""
        for key, storage in [*self._storages.items()]:
            alive = storage()
            if alive is not None and key in self._sizes and alive.nbytes() != self._sizes[key]:
                self.now += alive.nbytes() - self._sizes[key]
                self._sizes[key] = alive.nbytes()

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._storages[key] = weakref.ref(storage)
            weakref.finalize(storage, self._forget, key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)
        self._storages.pop(key, None)


class _Attention(torch.autograd.Function):
    """FlexAttention and FlashAttention keep q, k, v, their output and its log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, _out, _lse = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _Norm(torch.autograd.Function):
    """CUDA's fused RMS norm keeps its input and a number per row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _SwiGlu(torch.autograd.Function):
    """The compiled SwiGLU keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.new_empty((*x.shape[:-1], x.size(-1) // 2))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


class _Rotation(torch.autograd.Function):
    """The compiled rotation keeps the angles, which belong to the row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(grads[0])


def _attend(q: Any, k: Any, v: Any, *_: Any) -> Any:
    return _Attention.apply(q, k, v)


def _norm(self: Any, x: torch.Tensor) -> Any:
    return _Norm.apply(x, self.weight)


def _swiglu(x: torch.Tensor, *_: Any) -> Any:
    return _SwiGlu.apply(x)


def _rotate(x: torch.Tensor, *_: Any) -> Any:
    return _Rotation.apply(x)


def _same_everywhere(gathered: list[Any], value: Any, *_: Any) -> None:
    """For ``all_gather_object`` among ranks that are not there."""
    gathered[:] = [value] * len(gathered)


def _sums(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.new_empty((2, len(logits)), dtype=torch.float32)


def _logits_gradient(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(logits)


@contextlib.contextmanager
def fused() -> Generator[None]:
    """In place of a GPU's fused kernels, what they keep."""
    from megatron.core.transformer import mlp

    from system.learn import attention, head, model, rotary

    places: list[tuple[Any, str, Any]] = [
        (attention, "attend", _attend),
        (model.RMSNorm, "forward", _norm),
        (mlp, "bias_swiglu_impl", _swiglu),
        (rotary, "rotate", _rotate),
        (head, "_exponentials", _sums),
        (head, "_gradient", _logits_gradient),
        (head, "CHUNK", 1 << 62),  # a kernel takes all it is given
        (torch.distributed, "all_gather_object", _same_everywhere),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, imitation in places:
            stack.enter_context(patch.object(owner, name, imitation))
        yield
