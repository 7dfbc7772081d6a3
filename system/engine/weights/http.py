"""Weights as safetensors bodies over HTTP, for the embedded engine: it stages them beside the serving weights
and swaps at a token boundary.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from safetensors.torch import save as save_safetensors

from system.engine.checksum import combine, tensor_checksum
from system.engine.http import Body, Http
from system.engine.protocol import EngineError
from system.engine.weights.base import Bucket, Buckets, Kv, PushFailed, PushReport, by_outcome, each, size


class SafetensorsHttp:
    """The embedded engine's transport.  Implements :class:`~system.engine.weights.base.Transport`."""

    async def push(
        self, http: Http, urls: Sequence[str], buckets: Buckets, version: int, kv: Kv
    ) -> PushReport:
        failures: dict[str, EngineError] = {}

        async def call(path: str, body: Body) -> dict[str, dict[str, Any]]:
            left = [url for url in urls if url not in failures]
            calls = (http.post(url, path, body) for url in left)
            answers, failed = by_outcome(left, await asyncio.gather(*calls, return_exceptions=True))
            failures.update(failed)
            return answers

        began = time.perf_counter()
        await call("/begin_weight_update", {})
        sums, sent_bytes = [], 0
        async for bucket in each(buckets):
            data, checksum = await asyncio.to_thread(_pack, bucket)
            sums.append(checksum)
            sent_bytes += size(bucket)
            await call("/update_weights_from_tensor", data)
        report = PushReport(sent_bytes, time.perf_counter() - began)
        sent = str(combine(sums))
        answers = await call("/end_weight_update", {"weight_version": str(version), "kv": kv})
        for url, answer in answers.items():
            held = answer.get("checksum")
            if held != sent:
                failures[url] = EngineError(f"{url}: holds weights with checksum {held}, sent {sent}")
        if failures:
            raise PushFailed(failures, report)
        return report

    def close(self) -> None:
        pass


def _pack(bucket: Bucket) -> tuple[bytes, int]:
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in bucket.items()}
    return save_safetensors(tensors), combine(
        tensor_checksum(name, tensor) for name, tensor in tensors.items()
    )
