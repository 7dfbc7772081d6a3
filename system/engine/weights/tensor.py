"""Weights through memory that the learner shares with the servers of its own machine.

Only handles travel: names of shared memory segments on a CPU, CUDA IPC handles on a GPU.  SGLang takes them
as a pickle.  This process writes that pickle and sends it to servers that the run itself has named; it never
unpickles anything that a peer has sent.

A server must see the learner's GPU, whose UUID the handle names.  Ray shows every process its own GPUs only,
so between GPUs this is for servers that somebody else has started (``engine.urls``):
``system/config/check.py``.
"""

from __future__ import annotations

import base64
import contextlib
import io
import threading
from collections.abc import Generator
from itertools import accumulate
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing as torch_mp
from torch import Tensor
from torch.multiprocessing import reductions

from system.engine.weights.base import Bucket
from system.engine.weights.sglang import Carrier, PushTarget

_ALIGNMENT = 64  # bytes; every tensor of a bucket begins at a multiple
_CUDA_DEVICE = 6  # index of the device among reduce_tensor's arguments for a CUDA tensor
_strategy = threading.Lock()


class SharedTensors(Carrier):
    """``/update_weights_from_tensor``.

    A bucket is one flat buffer, so that it costs one segment or one handle; its tensors are views of it.  On
    a GPU the buffers are filled one at a time inside the pause, for a second copy of the model would not fit.
    """

    def stage(self, bucket: Bucket) -> None:
        with _by_name():
            super().stage(flatten(bucket, torch.device("cpu"), shared=True))

    async def load(self, server: PushTarget, bucket: dict[str, Tensor], flush_cache: bool) -> None:
        if server.device == "cuda":
            bucket = flatten(bucket, torch.device("cuda", torch.cuda.current_device()))
            torch.cuda.synchronize()  # the handle may be opened before the copy has ended
        await server.post(
            "/update_weights_from_tensor",
            serialized_named_tensors=[handles(bucket) for _ in range(server.tp)],
            flush_cache=flush_cache,
        )

    def clear(self) -> None:
        super().clear()
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()


def flatten(bucket: Bucket, device: torch.device, shared: bool = False) -> dict[str, Tensor]:
    """Copies of the bucket's tensors as views of one buffer on ``device``."""
    sizes = [-(-t.numel() * t.element_size() // _ALIGNMENT) * _ALIGNMENT for t in bucket.values()]
    starts = [0, *accumulate(sizes)]
    flat = torch.empty(starts[-1], dtype=torch.uint8, device=device)
    if shared:
        flat.share_memory_()
    views = {}
    for (name, tensor), start in zip(bucket.items(), starts, strict=False):
        end = start + tensor.numel() * tensor.element_size()
        views[name] = flat[start:end].view(tensor.dtype).view(tensor.shape)
        views[name].copy_(tensor)
    return views


def handles(tensors: dict[str, Tensor]) -> str:
    """Base64 of the pickle from which one SGLang rank opens the tensors: a list of (name, tensor).

    Each rank needs one of its own, for opening it gives up one reference to the memory.
    """
    buffer = io.BytesIO()
    with _by_name():
        _Pickler(buffer).dump(list(tensors.items()))
    return base64.b64encode(buffer.getvalue()).decode("ascii")


class _Pickler(ForkingPickler):
    """Names a GPU by its UUID, as SGLang reads it: the two processes may number their devices differently."""

    def reducer_override(self, obj: Any) -> Any:
        if not (isinstance(obj, Tensor) and obj.is_cuda):
            return NotImplemented
        rebuild, arguments = reductions.reduce_tensor(obj)
        uuid = str(torch.cuda.get_device_properties(obj.device).uuid)
        return rebuild, (*arguments[:_CUDA_DEVICE], uuid, *arguments[_CUDA_DEVICE + 1 :])


@contextlib.contextmanager
def _by_name() -> Generator[None]:
    """Share CPU memory as named segments: SGLang cannot receive the file descriptors that are the default."""
    with _strategy:
        before = torch_mp.get_sharing_strategy()
        torch_mp.set_sharing_strategy("file_system")
        try:
            yield
        finally:
            torch_mp.set_sharing_strategy(before)
