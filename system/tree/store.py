"""Closed trees on disk, as Parquet: one row per tree, list-typed columns for its arrays.

Any Parquet reader understands the files, for example DuckDB::

    SELECT prompt_id, list_avg(reward) FROM 'trees/*.parquet' ORDER BY number

Columns carry the names of the fields of :class:`~system.tree.record.Tree`.  ``calls`` and ``forks`` are lists
of structs; a call's ``arguments`` and the tree's ``meta`` are JSON text; ``routes`` are the bytes of an array
of ``routes_shape``, one or two a number.  ``number`` counts the trees of the
run, kept or not. The schema's version stands in the file's metadata under ``espalier.schema``; a column that
came later (``sampled_prompt``, ``step_reward``, ``episode``, ``routes``, ``opened_s``, …) may be missing, and
then has its default.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from system.errors import EspalierError
from system.tree.record import ARRAYS, OPTIONAL, ForkDecision, ToolCall, Tree
from system.tree.routes import Routes, no_routes

SCHEMA_VERSION = "1"
_VERSION_KEY = b"espalier.schema"
_NAME = re.compile(r"trees-\d{9}\.parquet")

_NUMBERS = {"budget": pa.int32(), "started_s": pa.float64(), "closed_s": pa.float64(), "guide": pa.int32()}
_FIELDS = {  # of a call or a fork, by the annotation
    "int": pa.int32(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "str": pa.string(),
    "dict[str, Any]": pa.string(),
}
_CALL, _FORK = (
    pa.struct([(field.name, _FIELDS[str(field.type)]) for field in fields(record)])
    for record in (ToolCall, ForkDecision)
)
SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("prompt_id", pa.string()),
        ("task", pa.string()),
        *((name, pa.list_(pa.from_numpy_dtype(dtype))) for name, dtype in ARRAYS.items()),
        ("routes", pa.binary()),
        ("routes_shape", pa.list_(pa.int32())),
        ("calls", pa.list_(_CALL)),
        ("forks", pa.list_(_FORK)),
        *_NUMBERS.items(),
        ("meta", pa.string()),
    ],
    metadata={_VERSION_KEY: SCHEMA_VERSION.encode()},
)


class StoreError(EspalierError, ValueError):
    """A file that is not one of ours, or of a schema this version does not read."""


class TreeWriter(AbstractContextManager["TreeWriter"]):
    """Appends closed trees to a directory, in small files that appear whole or not at all.

    A file is written under a hidden name, flushed to disk and renamed, so readers may read at any time and a
    killed writer loses only what it had not flushed.  One writer per directory; a new writer goes on where
    the last one stopped.
    """

    def __init__(self, directory: str | Path, keep: int = -1, flush_trees: int = 8) -> None:
        """``keep``: the newest trees that stay on disk (a few more do, as whole files go); -1: all; 0: none.

        ``flush_trees``: trees per file.
        """
        if keep < -1 or flush_trees < 1:
            raise ValueError(f"{keep=}, {flush_trees=}: out of range")
        self.directory, self.keep, self.flush_trees = Path(directory), keep, flush_trees
        self.directory.mkdir(parents=True, exist_ok=True)
        for partial in self.directory.glob(".trees-*.partial"):  # a killed writer's last breath
            partial.unlink()
        self._files = {path: rows for path in complete_files(self.directory) if (rows := _rows(path))}
        newest = next(reversed(self._files), None)
        self._next = 0 if newest is None else file_number(newest) + self._files[newest]
        self._waiting: list[pa.Table] = []  # of one tree each

    def append(self, tree: Tree) -> None:
        """Take a tree; every ``flush_trees``-th call writes a file.

        A tree that no table can hold raises Arrow's error here, and leaves the others alone.
        """
        if self.keep == 0:
            return
        self._waiting.append(to_table([tree], self.number))
        if len(self._waiting) >= self.flush_trees:
            self.flush()

    @property
    def number(self) -> int:
        """Of the next tree."""
        return self._next + len(self._waiting)

    def skip(self) -> None:
        """Leave out the next tree: its number is nobody's."""
        if self.keep != 0:
            self.flush()
            self._next += 1

    def flush(self) -> None:
        """Write the waiting trees, then delete files whose trees are all older than the newest ``keep``."""
        if self._waiting:
            path = write_file(self.directory, self._next, pa.concat_tables(self._waiting).combine_chunks())
            self._files[path] = len(self._waiting)
            self._next += len(self._waiting)
            self._waiting = []
        self._prune()

    def __exit__(self, *_: object) -> None:
        self.flush()

    def _prune(self) -> None:
        if self.keep < 0:
            return
        kept = sum(self._files.values())
        for path, rows in list(self._files.items()):  # oldest first
            if kept - rows < self.keep:
                break
            path.unlink(missing_ok=True)
            del self._files[path]
            kept -= rows


def write_file(directory: Path, number: int, table: pa.Table) -> Path:
    """Write the trees of ``table``, the first of them number ``number``, into a file that appears whole."""
    path = directory / f"trees-{number:09d}.parquet"
    partial = directory / f".{path.stem}.partial"
    with open(partial, "wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    return partial.rename(path)


def read_tree(directories: Sequence[Path], number: int) -> Tree | None:
    """Tree ``number`` of a run, by its directories; None where none keeps it.  Raises :class:`StoreError`."""
    for directory in directories:
        before = [path for path in complete_files(directory) if file_number(path) <= number]
        for path in before[-1:]:
            try:
                table = pq.read_table(path, filters=[("number", "=", number)])
            except (pa.ArrowInvalid, OSError) as error:
                raise StoreError(f"{path} is not a readable Parquet file: {error}") from error
            for tree in from_table(table, source=str(path)):
                return tree
    return None


def file_number(path: Path) -> int:
    """Of the first tree in a file."""
    return int(path.stem.removeprefix("trees-"))


def read_trees(directory: str | Path) -> Iterator[Tree]:
    """The trees of a directory, oldest first; a writer may be at work.  Raises :class:`StoreError`."""
    return (tree for _, tree in _numbered(complete_files(Path(directory))))


def numbered_trees(newest: Path, sample: Path) -> Iterator[tuple[int, Tree]]:
    """All that a run keeps, oldest first, by number: the ``newest``, and before them those of its ``sample``
    that are older.  Raises :class:`StoreError`.
    """
    there = complete_files(newest)
    first = file_number(there[0]) if there else math.inf
    older = _numbered(path for path in complete_files(sample) if file_number(path) < first)
    yield from (one for one in older if one[0] < first)
    yield from _numbered(there)


def newest_trees(directory: str | Path, most: int) -> list[Tree]:
    """The newest ``most`` trees of a directory, oldest first: no more files are read than hold them.  Raises
    :class:`StoreError`.
    """
    found: list[Tree] = []
    for path in reversed(complete_files(Path(directory))):
        if len(found) >= most:
            break
        found = [*(tree for _, tree in _numbered([path])), *found]
    return found[max(0, len(found) - most) :]


def _numbered(paths: Iterable[Path]) -> Iterator[tuple[int, Tree]]:
    """The trees of some files by number; none of one that the writer has pruned since they were listed."""
    for path in paths:
        try:
            table = pq.read_table(path)
        except FileNotFoundError:
            continue
        except (pa.ArrowInvalid, OSError) as error:
            raise StoreError(f"{path} is not a readable Parquet file: {error}") from error
        for i, tree in enumerate(from_table(table, source=str(path))):
            yield table["number"][i].as_py(), tree


def to_table(trees: Sequence[Tree], first_number: int = 0) -> pa.Table:
    """An Arrow table of :data:`SCHEMA`, one row per tree."""
    columns = {
        "number": np.arange(first_number, first_number + len(trees)),
        "prompt_id": [_text(tree.prompt_id) for tree in trees],
        "task": [_text(tree.task) for tree in trees],
        **{name: [getattr(tree, name) for tree in trees] for name in (*ARRAYS, *_NUMBERS)},
        "routes": [tree.routes.tobytes() for tree in trees],
        "routes_shape": [np.array(tree.routes.shape, np.int32) for tree in trees],
        "calls": [[_row(call) for call in tree.calls] for tree in trees],
        "forks": [[_row(fork) for fork in tree.forks] for tree in trees],
        "meta": [json.dumps(tree.meta) for tree in trees],
    }
    return pa.Table.from_pydict(columns, SCHEMA)


def from_table(table: pa.Table, source: str = "table") -> Iterator[Tree]:
    """The inverse of :func:`to_table`."""
    version = (table.schema.metadata or {}).get(_VERSION_KEY, b"").decode()
    if version != SCHEMA_VERSION:
        raise StoreError(f"{source}: tree schema {version or 'missing'}; this version reads {SCHEMA_VERSION}")
    # Each array in its own memory, lest one tree keep the whole table alive.
    there = [name for name in ARRAYS if name not in OPTIONAL or name in table.column_names]
    arrays = {name: [row.values.to_numpy().copy() for row in table.column(name)] for name in there}
    rows = table.drop_columns(there).to_pylist()
    for i, row in enumerate(rows):
        calls = (ToolCall(**{**call, "arguments": json.loads(call["arguments"])}) for call in row["calls"])
        yield Tree(
            **{name: array[i] for name, array in arrays.items()},
            **{name: row[name] for name in ("prompt_id", "task", *_NUMBERS) if name in row},
            routes=_routes(row),
            calls=tuple(calls),
            forks=tuple(ForkDecision(**fork) for fork in row["forks"]),
            meta=json.loads(row["meta"]),
        )


def _routes(row: dict[str, Any]) -> Routes:
    """A file of before they were recorded has none."""
    if not row.get("routes"):
        return no_routes()
    data, shape = row["routes"], row["routes_shape"]
    wide = len(data) > math.prod(shape)
    return np.frombuffer(data, np.uint16 if wide else np.uint8).reshape(shape).copy()


def _rows(path: Path) -> int:
    """How many trees a file holds; one that is damaged is set aside, as these files are for looking only."""
    try:
        return footer(path)[0]
    except (pa.ArrowInvalid, OSError):
        path.rename(path.with_name(f"{path.name}.damaged"))
        return 0


def footer(path: Path) -> tuple[int, dict[bytes, bytes]]:
    """How many trees a file holds, and what we say in its metadata.  Raises Arrow's error, or OSError.

    Read once in a process: writers are made for every batch, and there may be hundreds of files.
    """
    found = path.stat()
    return _read_footer(path, (found.st_ino, found.st_mtime_ns))


@lru_cache(maxsize=4096)
def _read_footer(path: Path, _file: tuple[int, int]) -> tuple[int, dict[bytes, bytes]]:
    read = pq.read_metadata(path)
    ours = {key: value for key, value in (read.metadata or {}).items() if key.startswith(b"espalier.")}
    return read.num_rows, ours


def complete_files(directory: Path) -> list[Path]:
    """The files of trees in ``directory``, oldest first; none where there is no such directory."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))


def _text(text: str) -> str:
    """``text`` with lone surrogates escaped: UTF-8 cannot hold them, and a model may write them in a call."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _row(record: ToolCall | ForkDecision) -> dict[str, Any]:
    row = {field.name: getattr(record, field.name) for field in fields(record)}
    if isinstance(record, ToolCall):
        row |= {"tool": _text(record.tool), "arguments": json.dumps(record.arguments)}
    return row
