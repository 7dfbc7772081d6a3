"""Weights through a directory that the learner writes and the servers read."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path

from system.engine.weights.base import Bucket, size
from system.engine.weights.sglang import Carrier, PushTarget
from system.models.directory import INDEX
from system.models.files import write_index, write_weights
from system.scratch import Scratch


class Disk(Carrier):
    """``/update_weights_from_disk``.

    Works between any two machines that share a file system, and is the slowest way.  Each update has a
    directory of its own under ``root``; the last one that was loaded stays, because SGLang goes back to it
    when a later load fails.
    """

    def __init__(self, root: Path | None = None) -> None:
        """``root``: None takes a temporary directory of this machine, for servers on it."""
        super().__init__()
        self._root = root or _own(self)
        self._root.mkdir(parents=True, exist_ok=True)
        self._number = 0
        self._files: dict[str, str] = {}
        self._bytes = 0

    @property
    def directory(self) -> Path:
        """Of the update that is being staged."""
        return self._root / f"update-{self._number:06d}"

    def stage(self, bucket: Bucket) -> None:
        if not self._files:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir()
        number = len(set(self._files.values()))
        name = f"model-{number:05d}.safetensors"
        tensors = {n: t.detach().to("cpu").contiguous() for n, t in bucket.items()}
        write_weights(tensors, self.directory / name)
        self._files |= dict.fromkeys(bucket, name)
        self._bytes += size(bucket)

    async def connect(self, server: PushTarget) -> None:
        if not (self.directory / INDEX).is_file():
            write_index(self.directory, self._files, self._bytes)

    async def deliver(self, server: PushTarget, flush_cache: bool) -> None:
        await server.post(
            "/update_weights_from_disk", model_path=str(self.directory), flush_cache=flush_cache
        )

    def clear(self) -> None:
        if self._files:
            for old in self._root.glob("update-*"):
                if old != self.directory:
                    shutil.rmtree(old)
            self._number += 1
        self._files, self._bytes = {}, 0


def _own(owner: Disk) -> Path:
    """A temporary directory that goes with ``owner``."""
    scratch = Scratch.make("weights")
    weakref.finalize(owner, shutil.rmtree, scratch.path, ignore_errors=True)
    return scratch.path
