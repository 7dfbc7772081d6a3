"""How new weights travel from the learner into running engines.

One module per way.  :class:`~system.engine.weights.base.Transport` is what they have in common; ``make``
picks one by the configuration.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from system.config import ConfigError, EngineConfig
from system.engine.weights.base import Transport, on_this_host

if TYPE_CHECKING:  # whoever only generates does without PyTorch
    from system.models.adapter import Adapter


def choose(engine: EngineConfig, urls: list[str], gpu: bool) -> str:
    """The way that ``engine.weights=auto`` stands for, for servers at ``urls``.

    ``gpu``: the learner has one, which the servers then do not see (:mod:`system.engine.weights.tensor`).
    """
    if engine.weights != "auto":
        return engine.weights
    if engine.name == "embedded":
        return "http"
    return "tensor" if all(map(on_this_host, urls)) and not gpu else "distributed"


def make(
    engine: EngineConfig,
    urls: list[str],
    model_path: str | Path,
    dtype: str,
    address: str = "127.0.0.1",
    run: Path | None = None,
    adapter: Adapter | None = None,
) -> Transport:
    """The configured transport to the servers at ``urls``.

    ``model_path`` is the directory the engines were started from: it says which tensors the model has, and
    ``dtype`` is what they hold them in.  ``address`` is where servers on other machines reach this process;
    ``run`` is the run's directory.  ``adapter``: buckets hold adapters of this kind alone
    (``adapters_travel``).
    Raises :class:`~system.config.ConfigError` and ``UnsupportedModel``.
    """
    import torch

    from system.engine.weights.http import SafetensorsHttp

    if adapter is not None and engine.name == "sglang":
        from system.engine.weights.sglang_adapters import SGLangAdapters

        return SGLangAdapters(adapter, model_path, dtype)
    way = choose(engine, urls, torch.cuda.is_available())
    if way == "http":
        return SafetensorsHttp(adapter)
    from system.engine.weights.disk import Disk
    from system.engine.weights.distributed import Distributed
    from system.engine.weights.sglang import SGLangTransport
    from system.engine.weights.tensor import SharedTensors

    match way:
        case "disk":
            if not engine.weights_dir and not all(map(on_this_host, urls)):
                raise ConfigError(
                    "engine.weights=disk with engines on other machines: set engine.weights_dir to a "
                    "directory that the learner and all engines see under the same name"
                )
            carrier = Disk(Path(engine.weights_dir) if engine.weights_dir else None, run)
        case "distributed":
            carrier = Distributed(address)
        case _:
            carrier = SharedTensors()
    return SGLangTransport(carrier, model_path, dtype)
