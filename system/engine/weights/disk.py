"""Weights through a directory that the learner writes and the servers read."""

from __future__ import annotations

import hashlib
import shutil
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from system.engine.control import CONTROL_DEADLINE_S
from system.engine.weights.base import Bucket, size
from system.engine.weights.sglang import Carrier, PushTarget
from system.models.files import write_index, write_weights
from system.scratch import Scratch

STRIPES = 4  # files of a bucket, written at once: a parallel file system puts them on different disks
SLOWEST_BYTES_S = 1e9  # of a file system that all servers read from together


class Disk(Carrier):
    """``/update_weights_from_disk``.

    Works between any two machines that share a file system, and is the slowest way.  Each update has a
    directory of its own; the last one that a server loaded stays, because SGLang goes back to it when a later
    load fails.
    """

    def __init__(self, root: Path | None = None, run: Path | None = None) -> None:
        """``root``: which several runs may share.  Each has a directory of its own in it, by its run
        directory ``run``, which goes with the carrier; what a run that was killed has left, it takes over
        when it is resumed.  None takes a temporary directory of this machine, for servers on it.
        """
        super().__init__()
        self._root = _own(self, root, run or Path.cwd())
        self._loaded: dict[str, Path] = {}  # URL -> the last that this server has loaded
        self._number = 0
        self._files: dict[str, str] = {}
        self._bytes = 0
        self._readers = 0  # servers that read at once

    @property
    def directory(self) -> Path:
        """Of the update that is being staged."""
        return self._root / f"update-{self._number:06d}"

    def stage(self, bucket: Bucket) -> None:
        if not self._files:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir()
        tensors = {n: t.detach().to("cpu").contiguous() for n, t in bucket.items()}
        stripes, first = stripe(tensors), len(set(self._files.values()))
        names = [f"model-{first + i:05d}.safetensors" for i in range(len(stripes))]
        with ThreadPoolExecutor(STRIPES) as writers:
            list(writers.map(write_weights, stripes, [self.directory / name for name in names]))
        for one, name in zip(stripes, names, strict=True):
            self._files |= dict.fromkeys(one, name)
        self._bytes += size(bucket)

    async def connect(self, servers: Sequence[PushTarget]) -> dict[str, str]:
        write_index(self.directory, self._files, self._bytes)
        self._readers = len(servers)
        return {}

    async def deliver_to(self, server: PushTarget, flush_cache: bool) -> None:
        await server.post(
            "/update_weights_from_disk",
            limit_s=deadline_s(self._bytes, self._readers),
            model_path=str(self.directory),
            flush_cache=flush_cache,
        )
        self._loaded[server.url] = self.directory

    def clear(self) -> None:
        if self._files:
            kept = set(self._loaded.values())
            for update in self._root.glob("update-*"):
                if update not in kept:
                    shutil.rmtree(update)
            self._number += 1
        self._files, self._bytes = {}, 0


def stripe(bucket: Bucket) -> list[Bucket]:
    """The bucket in at most :data:`STRIPES` parts of about one size: each tensor to the least so far."""
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(min(STRIPES, len(bucket)))]
    for name, tensor in sorted(bucket.items(), key=lambda item: -item[1].nbytes):
        min(parts, key=size)[name] = tensor
    return [*parts]


def deadline_s(weight_bytes: int, readers: int) -> float:
    """Seconds that a server has to load, while ``readers`` of them do."""
    return CONTROL_DEADLINE_S + weight_bytes * readers / SLOWEST_BYTES_S


def _own(owner: Disk, root: Path | None, run: Path) -> Path:
    """A directory in ``root``, or in the system's temporary one, that goes with ``owner``."""
    if root is None:
        path = Scratch.make("weights").path
    else:
        whole = hashlib.sha256(str(run.absolute()).encode()).hexdigest()
        path = root.absolute() / f"{run.absolute().name}-{whole[:12]}"
        path.mkdir(parents=True, exist_ok=True)
    weakref.finalize(owner, shutil.rmtree, path, ignore_errors=True)
    return path
