"""The embedded engine without its HTTP side: a model, its weights and a decoding thread."""

from __future__ import annotations

import asyncio
import secrets
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from system.config import EngineConfig
from system.engine.checksum import weights_checksum
from system.engine.embedded.adapters import AdapterWeights, fuse_adapters, unfuse_adapters
from system.engine.embedded.loop import DecodeLoop
from system.engine.embedded.scheduler import Emitted, Scheduler
from system.engine.embedded.stops import TokenBytes
from system.engine.embedded.weights import (
    Weights,
    WeightsError,
    check,
    check_complete,
    check_tensors,
    fuse,
    load,
    unfuse,
)
from system.engine.routes import RouteFormat
from system.models.adapter import Adapter
from system.models.directory import end_tokens
from system.models.files import DTYPES
from system.models.shape import ModelShape

# How long decoding waits at most for the HTTP side to send what it has just produced.
_HANDOVER_S = 5e-3

_YIELDS = 4  # on the CPU, where Ray's workers are at 15 of 19


class EngineCore:
    """A model that decodes, and whose weights can be exchanged meanwhile.

    The model's dtype decides the KV cache's too.  ``seed`` makes requests that bring no seed of their own
    repeatable in their order of arrival.
    """

    def __init__(
        self, config: EngineConfig, model_path: str | Path, *, dtype: str = "float32", seed: int | None = None
    ):
        self.config = config
        self.path = Path(model_path)
        self.dtype = DTYPES[dtype]
        self.device = _device(config.device)
        self.shape = ModelShape.from_directory(self.path)
        self.routes = RouteFormat.of(self.shape)
        self.context = min(config.max_context, self.shape.max_position)
        self.vocabulary = TokenBytes.from_directory(self.path, self.shape.vocab)
        self._seeds = np.random.default_rng(secrets.randbits(64) if seed is None else seed)
        self._scheduler = Scheduler(
            config,
            self.shape,
            self.context,
            load(self.path, self.shape, self.dtype, self.device),
            end_tokens(self.path),
            self.dtype,
            self.device,
        )
        nice = _YIELDS if self.device.type == "cpu" and sys.platform == "linux" else 0
        self.loop = DecodeLoop(self._scheduler, self._deliver, config.threads, nice)
        self._staged: dict[str, Tensor] | None = None
        self._adapter: Adapter | None = None  # what is staged are adapters of this kind
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self._sent = threading.Event()

    def begin(self) -> None:
        """Start decoding; what it emits goes to the event loop that runs now."""
        self._asyncio = asyncio.get_running_loop()
        self.loop.start()

    def _deliver(self, emitted: list[Emitted]) -> None:
        """From the decoding thread: one hand-over, however many sequences have news.

        Waits a moment for the event loop to send them.  Both threads need the interpreter lock; taking turns
        is much faster than wresting it from each other around every torch operation.
        """
        assert self._asyncio is not None
        self._sent.clear()
        try:
            self._asyncio.call_soon_threadsafe(self._dispatch, emitted)
        except RuntimeError:  # the event loop has closed: nobody is left to tell
            if not self._asyncio.is_closed():
                raise
            return
        self._sent.wait(_HANDOVER_S)

    def _dispatch(self, emitted: list[Emitted]) -> None:
        for job, event in emitted:
            job.deliver(event)
        # The handlers that were just woken write in the loop's next round; the round after that, they have.
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._sent.set)

    def draw_seed(self) -> int:
        return int(self._seeds.integers(2**63))

    @property
    def version(self) -> int:
        """Of the weights that are served."""
        return self._scheduler.version

    def load_report(self) -> dict[str, float]:
        """SGLang's load report of its one data-parallel rank, and our counters.

        Reads them only; never waits for the decoding thread.
        """
        scheduler = self._scheduler
        return {
            "dp_rank": 0,
            "num_running_reqs": scheduler.running,
            "num_waiting_reqs": scheduler.waiting,
            "max_running_requests": self.config.max_running,
            **asdict(scheduler.counters),
            **{f"idle_{cause}_s": seconds for cause, seconds in self.loop.idle_s.items()},
        }

    # Weights -------------------------------------------------------------------------------------

    def begin_update(self, adapter: Adapter | None = None) -> None:
        """Open an update, of all weights or of adapters of this kind; one that was left open is discarded.

        Raises ``WeightsError`` for adapters of another kind than those that run.
        """
        stack = self._scheduler.adapters
        if adapter and stack and stack.newest.adapter != adapter:
            raise WeightsError(f"adapters: {adapter} offered, {stack.newest.adapter} held: start it anew")
        self._staged, self._adapter = {}, adapter

    @torch.inference_mode()
    def stage(self, tensors: dict[str, Tensor]) -> None:
        """Check and keep some tensors beside the serving weights.  Raises ``WeightsError``."""
        if self._staged is None:
            raise WeightsError("no weight update is open: call /begin_weight_update first")
        if self._adapter:
            check_tensors(self._adapter.tensors(self.shape), self.dtype, tensors)
        else:
            check(self.shape, self.dtype, tensors)
        self._staged.update(tensors)

    @torch.inference_mode()
    def take_staged(self) -> Weights | AdapterWeights:
        """Close the update: the complete new weights or adapters, fused and on the device."""
        staged, self._staged = self._staged, None
        if staged is None:
            raise WeightsError("no weight update is open: call /begin_weight_update first")
        if self._adapter:
            check_complete(self._adapter.tensors(self.shape), staged)
            return fuse_adapters(self.shape, self._adapter, staged, self.device)
        check_complete(self.shape.tensors(), staged)
        return fuse(self.shape, staged, self.device)

    @torch.inference_mode()
    def checksum(self) -> tuple[int, int]:
        """(weight version, checksum of the weights held, or of that version's adapters), of one moment;
        blocks, for a worker thread.
        """

        def held(scheduler: Scheduler) -> tuple[int, Weights | AdapterWeights]:
            adapters = scheduler.adapters
            return scheduler.version, adapters.newest if adapters else scheduler.weights

        version, now = self.loop.call(held).result(timeout=60)
        adapted = isinstance(now, AdapterWeights)
        return version, weights_checksum(
            unfuse_adapters(self.shape, now) if adapted else unfuse(self.shape, now)
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
