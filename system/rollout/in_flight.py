"""The trees of a checkpoint that no update has seen: those that grow, those that wait for the learner.

One zip file beside the learner's checkpoint: ``manifest.json``, ``growing/<i>.safetensors`` (see
:mod:`system.rollout.snapshot`) and ``closed.parquet`` (:mod:`system.tree.store`).  It is replaced as a whole
or not at all, and no code is in it.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from system.errors import EspalierError, naming
from system.tree.record import Tree
from system.tree.store import SCHEMA, from_table, to_table

FORMAT = 1


class SavedTreesError(EspalierError, ValueError):
    """A file that is none of ours, or is damaged."""


@dataclass(frozen=True, slots=True)
class SavedTree:
    """What has become of one prompt's tree so far."""

    epoch: int
    prompt_id: str
    start_version: int  # the learner's version when the tree started
    tree: Tree | bytes  # closed, or growing (a snapshot)


@dataclass(frozen=True, slots=True)
class SavedTrees:
    """``fingerprint``: of the configuration they were grown under.  ``books``: the recorder's state at that
    moment, in which the closed trees are counted.
    """

    fingerprint: dict[str, Any]
    books: dict[str, Any]
    trees: Iterable[SavedTree]


def write(path: Path, saved: SavedTrees) -> None:
    """Write or replace the file at ``path``; on disk when it returns.

    Closed trees are taken from ``saved.trees`` and written one after another, so that they need not be in
    memory all at once.
    """
    closed: list[list[Any]] = []
    growing: list[list[Any]] = []
    snapshots: list[bytes] = []
    partial = path.with_name(path.name + ".partial")
    with naming(path), partial.open("wb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            with (
                archive.open("closed.parquet", "w", force_zip64=True) as part,
                pq.ParquetWriter(part, SCHEMA, compression="zstd") as writer,
            ):
                for one in saved.trees:
                    entry = [one.epoch, one.prompt_id, one.start_version]
                    if isinstance(one.tree, Tree):
                        writer.write_table(to_table([one.tree], len(closed)))
                        closed.append(entry)
                    else:
                        growing.append(entry)
                        snapshots.append(one.tree)
            for number, snapshot in enumerate(snapshots):
                archive.writestr(f"growing/{number}.safetensors", snapshot)
            manifest = {
                "format": FORMAT,
                "fingerprint": saved.fingerprint,
                "books": saved.books,
                "growing": growing,
                "closed": closed,
            }
            archive.writestr("manifest.json", json.dumps(manifest))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read(path: Path) -> SavedTrees:
    """The inverse of :func:`write`; ``trees`` is a tuple.  Raises :class:`SavedTreesError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = json.loads(archive.read("manifest.json"))
            if manifest["format"] != FORMAT:
                raise SavedTreesError(f"{path}: format {manifest['format']}; this version reads {FORMAT}")
            closed = from_table(
                pq.read_table(pa.BufferReader(archive.read("closed.parquet"))), source=str(path)
            )
            trees = [
                SavedTree(epoch, prompt, version, tree)
                for (epoch, prompt, version), tree in zip(manifest["closed"], closed, strict=True)
            ]
            for number, (epoch, prompt, version) in enumerate(manifest["growing"]):
                data = archive.read(f"growing/{number}.safetensors")
                trees.append(SavedTree(epoch, prompt, version, data))
            return SavedTrees(manifest["fingerprint"], manifest["books"], tuple(trees))
    except Exception as error:  # zipfile and its decompressors raise whatever damage makes of them
        raise SavedTreesError(f"{path}: {type(error).__name__}: {error}") from error
