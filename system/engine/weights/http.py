"""Weights as safetensors bodies over HTTP, for the embedded engine: it stages them beside the serving weights
and swaps at a token boundary.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from safetensors.torch import save as save_safetensors

from system.engine.checksum import weights_checksum
from system.engine.control import Body, Http
from system.engine.weights.base import Bucket, Buckets, Kv, PushReport, each, outcomes, size
from system.models.adapter import Adapter


class SafetensorsHttp:
    """The embedded engine's transport.  Implements :class:`~system.engine.weights.base.Transport`."""

    on_gpu = False

    def __init__(self, adapter: Adapter | None = None) -> None:
        """``adapter``: buckets hold adapters of this kind alone, under PEFT's names."""
        self._begin: Body = {} if adapter is None else {"adapter": asdict(adapter)}

    async def push(
        self, http: Http, urls: Sequence[str], buckets: Buckets, version: int, kv: Kv
    ) -> PushReport:
        failures: dict[str, str] = {}

        async def call(path: str, body: Body) -> dict[str, dict[str, Any]]:
            left = [url for url in urls if url not in failures]
            answers, failed = await outcomes({url: http.call(url + path, body) for url in left})
            failures.update(failed)
            return answers

        began = time.perf_counter()
        await call("/begin_weight_update", self._begin)
        checksum, sent_bytes = 0, 0
        async for bucket in each(buckets):
            data, checksum = await asyncio.to_thread(_pack, bucket, checksum)
            sent_bytes += size(bucket)
            await call("/update_weights_from_tensor", data)
        staged_s = time.perf_counter() - began
        answers = await call("/end_weight_update", {"weight_version": str(version), "kv": kv})
        for url, answer in answers.items():
            held = answer.get("checksum")
            if held != str(checksum):
                failures[url] = f"{url}: holds weights with checksum {held}, sent {checksum}"
        return PushReport(sent_bytes, staged_s, failures=failures)


def _pack(bucket: Bucket, checksum: int) -> tuple[bytes, int]:
    """The bucket as safetensors, and the checksum of it and all before it, which was ``checksum``."""
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in bucket.items()}
    return save_safetensors(tensors), weights_checksum(tensors.items(), checksum)
