"""``python -m system.engine.embedded --model DIR --port P``: serve one model until interrupted."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
from collections.abc import Sequence

from system.config import EngineConfig
from system.engine.embedded import EmbeddedEngine
from system.http import is_loopback
from system.models.files import DTYPES
from system.serving import KEY_VARIABLE, stop_signals

log = logging.getLogger("system.engine.embedded")

_SIZES = ("threads", "max_running", "max_context", "cache_slots", "chunk_tokens")  # fields of EngineConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and serve."""
    defaults = EngineConfig()
    parser = argparse.ArgumentParser(prog="python -m system.engine.embedded", description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face model directory (safetensors)")
    parser.add_argument("--host", help="address to listen on (default: loopback only)")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default=defaults.device)
    for name in _SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args(arguments)
    config = EngineConfig(device=options.device, **{name: getattr(options, name) for name in _SIZES})
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    engine = EmbeddedEngine(config, options.model, dtype=options.dtype, seed=options.seed)
    asyncio.run(_serve(engine, options.host, options.port))


async def _serve(engine: EmbeddedEngine, host: str | None, port: int) -> None:
    stopped = stop_signals()
    key = os.environ.get(KEY_VARIABLE, "")
    url = await engine.start(host, port, key=key)
    if not key:
        who = f"anyone who reaches {host}" if host and not is_loopback(host) else "any user of this machine"
        log.warning("$%s is not set: %s can use and reload the model", KEY_VARIABLE, who)
    print(f"serving {engine.path} at {url}", flush=True)
    died = asyncio.ensure_future(asyncio.to_thread(engine.loop.wait))
    signalled = asyncio.ensure_future(stopped.wait())
    await asyncio.wait((died, signalled), return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
    await engine.stop()
    if failure := await died:  # whoever supervises this process starts another
        raise SystemExit(f"the engine failed: {failure}")


if __name__ == "__main__":
    main()
