"""Adapters (LoRA) into SGLang servers that go on generating: each version beside those before it.

A version is loaded under a name of its own; requests that begin from then on run with it, and one that runs
ends with the version that it began with.  So nothing pauses, and no keys and values are computed again:
SGLang's prefix cache keys them by adapter.  What chooses the newest, and says of tokens which version made
them, is our plug-in in the server (``in_server/plugin/espalier_adapters.py``).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from system.config.schema_lora import MODULES
from system.engine.checksum import tensor_bytes
from system.engine.control import Http
from system.engine.embedded.weights import STACKED, WeightsError, check_complete, check_tensors
from system.engine.protocol import EngineError
from system.engine.weights.base import Buckets, Kv, PushReport, each, outcomes, size
from system.engine.weights.digest import Digests
from system.engine.weights.layout import Fuser, ShardError
from system.engine.weights.sglang import Kind, PushTarget, difference, has_plugin, look_at
from system.models.adapter import Adapter
from system.models.files import DTYPES
from system.models.shape import ModelShape
from system.models.weights import WeightReader

log = logging.getLogger(__name__)

UNLOAD_DEADLINE_S = 10.0  # of one that no request uses
_CPU_MULTIPLE = 32  # per rank: without a GPU SGLang pads the MLP to it, of which its adapters know nothing


@dataclass(frozen=True)
class _Version:
    """What is sent of one version, but for the number of tensor-parallel ranks."""

    name: str
    config: dict[str, Any]
    digests: dict[str, str]  # SHA-256 of each tensor
    payload: str  # base64 of a pickle: each rank gets one


class SGLangAdapters:
    """Implements :class:`~system.engine.weights.base.Transport` for buckets of adapters alone.

    By value over ``/load_lora_adapter_from_tensors``: megabytes.  Every tensor-parallel rank compares the
    SHA-256 of each tensor with ours before it loads any.  The versions before are unloaded as far as no
    request uses them; others at a later push.

    Adapters are worth nothing on another model than theirs, and most of what differs from it takes them all
    the same.  So the first push to a server, and the first after each of its starts, compares the digests of
    its weights with those of the learner's base model.
    """

    on_gpu = False

    def __init__(self, adapter: Adapter, model_path: str | Path, dtype: str) -> None:
        """For servers of the model in ``model_path`` that hold it in ``dtype``."""
        self._adapter, self._dtype, self._base = adapter, DTYPES[dtype], Path(model_path)
        self._shape = ModelShape.from_directory(model_path)
        self._digests: dict[Kind, Digests] = {}  # of the base model
        # By URL: the start of the server that was looked at, and what is wrong with its base model.
        self._proved: dict[str, tuple[str, str]] = {}

    async def push(
        self, http: Http, urls: Sequence[str], buckets: Buckets, version: int, kv: Kv
    ) -> PushReport:
        """``kv`` decides nothing: no request changes its version."""
        began = time.perf_counter()
        expected = self._adapter.tensors(self._shape)
        tensors: dict[str, Tensor] = {}
        async for bucket in each(buckets):
            tensors |= {name: tensor.detach().to("cpu").contiguous() for name, tensor in bucket.items()}
        try:
            check_tensors(expected, self._dtype, tensors)
            check_complete(expected, tensors)
        except WeightsError as error:
            failures = {url: f"{url}: not sent: {error}" for url in urls}
        else:
            packed = self._pack(tensors, version)
            servers, failures = await outcomes({url: self._look(http, url) for url in urls})
            for kind in {one.kind for one in servers.values()} - self._digests.keys():
                self._digests[kind] = await asyncio.to_thread(self._digest, kind)
            calls = {url: self._load(one, packed, version) for url, one in servers.items()}
            failures |= (await outcomes(calls))[1]
        return PushReport(size(tensors), time.perf_counter() - began, failures=failures)

    def _pack(self, tensors: Mapping[str, Tensor], version: int) -> _Version:
        whole = completed(self._shape, self._adapter)
        sent = {
            name: tensors[name] if name in tensors else torch.zeros(one, dtype=self._dtype)
            for name, one in whole.tensors(self._shape).items()
        }
        digests = {name: hashlib.sha256(tensor_bytes(tensor)).hexdigest() for name, tensor in sent.items()}
        mark = hashlib.sha256("".join(digests.values()).encode()).hexdigest()[:16]
        payload = base64.b64encode(pickle.dumps(sent)).decode("ascii")
        return _Version(f"v{version}-{mark}", whole.peft_config(), digests, payload)

    async def _look(self, http: Http, url: str) -> PushTarget:
        server, info = await look_at(http, url)
        self._check(server, info)
        return server

    def _digest(self, kind: Kind) -> Digests:
        """Of the base model, as a server of that kind is to hold it.  Reads all of its files."""
        digests, reader = Digests(self._shape, *kind), WeightReader(self._base)
        for name in self._shape.tensors():
            digests.add({name: reader.read(name, self._dtype)})
        return digests

    async def _prove_base(self, server: PushTarget) -> None:
        """Raise :class:`EngineError` for a server that holds another model than the learner's."""
        started, wrong = self._proved.get(server.url, ("", ""))
        if started != server.incarnation:
            found = await difference(server, self._digests[server.kind])
            dtype = str(self._dtype).removeprefix("torch.")
            wrong = found and (
                f"{server.url}: its model is not the learner's base model, {self._base} in {dtype}: {found}: "
                f"start it with --model-path {self._base} --dtype {dtype}, and without --quantization and "
                "--load-format dummy, or set learn.lora.sync=merged, with which all weights are sent"
            )
            self._proved[server.url] = server.incarnation, wrong
        if wrong:
            raise EngineError(wrong)

    async def _load(self, server: PushTarget, packed: _Version, version: int) -> None:
        await self._prove_base(server)
        answer = await server.post(
            "/load_lora_adapter_from_tensors",
            lora_name=packed.name,
            config_dict=packed.config,
            serialized_named_tensors=[packed.payload] * server.tp,
            expected_checksums=packed.digests,
        )
        await server.post("/update_weight_version", new_version=str(version), abort_all_requests=False)
        for name in answer.get("loaded_adapters") or {}:
            if name != packed.name and ours(name):
                try:
                    await server.post("/unload_lora_adapter", limit_s=UNLOAD_DEADLINE_S, lora_name=name)
                except EngineError as error:  # requests use it: after a later push
                    log.debug("adapter %s stays: %s", name, error)

    def _check(self, server: PushTarget, info: Mapping[str, Any]) -> None:
        """Raise :class:`EngineError` for a server that cannot take these adapters."""
        if not has_plugin(info):
            raise EngineError(
                f"{server.url}: learn.lora.sync=adapter needs Espalier's plug-in in the server, without "
                "which requests would run without adapters: put it on its PYTHONPATH, or set "
                "learn.lora.sync=merged"
            )
        if not info.get("enable_lora") or int(info.get("max_lora_rank") or 0) < self._adapter.rank:
            raise EngineError(
                f"{server.url}: it takes no adapters of rank {self._adapter.rank}: start it with "
                f"--enable-lora --max-lora-rank {self._adapter.rank} --lora-target-modules "
                f"{' '.join(MODULES[part] for part in self._adapter.parts)}, or set learn.lora.sync=merged"
            )
        if codes := info.get("quantization"):
            raise EngineError(
                f"{server.url}: started with quantization={codes}, while the learner trains adapters for "
                "weights that are not rounded so: start it without --quantization, or set "
                "learn.lora.sync=merged"
            )
        try:
            Fuser(self._shape, server.tp, server.device)
        except ShardError as error:
            raise EngineError(f"{server.url}: {error}") from error
        multiple = _CPU_MULTIPLE * server.tp
        # Of a mixture of experts no adapter is on what is padded.
        if server.device == "cpu" and self._shape.experts is None and self._shape.ffn % multiple:
            raise EngineError(
                f"{server.url}: without a GPU SGLang takes adapters of a model whose intermediate_size is a "
                f"multiple of {multiple} only; it is {self._shape.ffn}: set learn.lora.sync=merged"
            )


def completed(shape: ModelShape, adapter: Adapter) -> Adapter:
    """``adapter`` with all parts of every product that SGLang fuses, as soon as it has one of them."""
    wanted = {part for stack in STACKED.values() if {*stack} & {*adapter.parts} for part in stack}
    parts = tuple(part for part in shape.layer_parts(0) if part in wanted)
    return Adapter(adapter.rank, adapter.alpha, parts)


def ours(name: str) -> bool:
    """Whether an adapter of a server has a name that this module gives: ``v12-3c9e…``."""
    version, dash, _ = name.partition("-")
    return bool(dash) and version[:1] == "v" and version[1:].isdigit()
