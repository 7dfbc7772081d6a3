"""Append-only JSON lines that survive ``kill -9``.

A record is one ``write`` of one line to a file opened for appending, so a process that dies leaves at most
one torn line, and only at the end.  The reader skips such a tail; the writer cuts it off before it appends,
because a record that was never whole was never written.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from system.errors import EspalierError, naming


class JsonlError(EspalierError, ValueError):
    """A line in the middle of the file is not JSON: not a torn tail, so somebody else wrote there."""


class JsonlWriter:
    """Appends mappings to ``path``, one JSON line each; a number that is not finite becomes ``null``.

    A model may write half of a surrogate pair, for which UTF-8 has no form: it becomes JSON's own escape.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        _cut_torn_tail(self._fd)

    def write(self, record: Mapping[str, Any]) -> None:
        text = json.dumps(jsonable(record), ensure_ascii=False, allow_nan=False) + "\n"
        line = text.encode(errors="backslashreplace")
        with naming(self._path):
            try:
                written = os.write(self._fd, line)
                while written < len(line):  # a signal or a nearly full disk can shorten a write
                    written += os.write(self._fd, line[written:])
            except OSError:
                _cut_torn_tail(self._fd)
                raise

    def sync(self) -> None:
        """Make everything written so far survive a crash of the machine, not only of the process."""
        with naming(self._path):
            os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Records in order; nothing when the file does not exist.  A torn last line is skipped.

    Raises :class:`JsonlError` for a bad line that is not the last.
    """
    path = Path(path)
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # torn, or still being written
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # the latter: nested too deeply
                raise JsonlError(f"{path}, line {number}: not JSON: {error}") from error
            if not isinstance(record, dict):
                raise JsonlError(f"{path}, line {number}: expected an object, found {type(record).__name__}")
            yield record


def split_off(path: Path, records: int, rest: Path) -> None:
    """Move what follows the first ``records`` records of ``path`` into a new file, ``rest``.

    It is on disk there before it goes here: a crash in between leaves it in both.
    """
    at = 0
    with path.open("r+b") as file:
        while records:
            line = file.readline()
            at += len(line)
            records -= bool(line.strip())
        with rest.open("xb") as other:
            shutil.copyfileobj(file, other)
            other.flush()
            os.fsync(other.fileno())
        file.truncate(at)
        os.fsync(file.fileno())


def jsonable(value: Any) -> Any:
    """``value`` in terms strict JSON knows: numpy's numbers as Python's, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.ndarray):
        return [jsonable(item) for item in value.tolist()]
    if isinstance(value, np.generic):
        return jsonable(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value


def _cut_torn_tail(fd: int) -> None:
    """Truncate an open file after its last newline."""
    size = os.fstat(fd).st_size
    if size:
        with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as text:
            end = text.rfind(b"\n") + 1
        if end < size:
            os.ftruncate(fd, end)
