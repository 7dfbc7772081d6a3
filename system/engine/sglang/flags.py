"""SGLang's own command-line flags: passed through from ``engine.sglang``, never declared again here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Flags that the rest of the system depends on, and what sets each of them.
SET_BY: dict[str, str] = {
    **dict.fromkeys(("model", "model_path"), "model.path"),
    **dict.fromkeys(("tp", "tp_size", "tensor_parallel_size"), "engine.tp"),
    **dict.fromkeys(("dp", "dp_size", "data_parallel_size"), "engine.replicas"),
    **dict.fromkeys(("port", "incremental_streaming_output"), "the system"),
    "dtype": "model.dtype",
    "device": "engine.device",
    "host": "engine.host",
    "context_length": "engine.max_context",
    "max_running_requests": "engine.max_running",
    "stream_interval": "engine.chunk_tokens",
    "random_seed": "run.seed",
}


def problems(name: str, native: Mapping[str, Any], urls: Sequence[str]) -> Iterator[str]:
    """What is wrong with ``engine.sglang`` and ``engine.urls`` under the engine ``name``."""
    for flag in native:
        if setter := SET_BY.get(flag.replace("-", "_")):
            yield f"engine.sglang.{flag} is set by {setter}: take it out of engine.sglang"
    for url in urls:
        if not url.startswith(("http://", "https://")):
            yield f"engine.urls: {url!r} must begin with http:// or https://"
    if urls and name != "sglang":
        yield "engine.urls attaches to SGLang servers: set engine=sglang, or take engine.urls out"


def words(settings: Mapping[str, Any]) -> list[str]:
    """``{"a_b": 1, "on": True, "off": False, "gone": None}`` -> ``["--a-b", "1", "--on"]``.

    A list becomes several words after its flag, a mapping JSON.
    """
    line: list[str] = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        line.append("--" + name.replace("_", "-"))
        if value is True:
            continue
        if isinstance(value, list | tuple):
            line += [str(item) for item in value]
        else:
            line.append(json.dumps(value) if isinstance(value, Mapping) else str(value))
    return line
