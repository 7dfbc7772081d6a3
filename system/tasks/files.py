"""Rows of data files: JSON lines, JSON, Parquet, CSV and TSV, also gzipped; of one, a directory, a glob.

Text is UTF-8 with or without a byte order mark, or UTF-16 with one.  A place that cannot be read is a
:class:`DataError` that names the file and the line.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from glob import escape, glob
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from system.config import ConfigError
from system.errors import EspalierError
from system.plugins import nearest

Row = Mapping[str, Any]
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")

_ABOUT = re.compile(r"dataset_(infos?|dict)\.json|state\.json")  # what Hugging Face puts beside the data
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])")


class DataError(ConfigError):
    """A data file that cannot be used; the message names the file, the row and the column."""


class KeyTwice(EspalierError, ValueError):
    """An object of JSON says something twice: which is meant nobody knows."""


def data_files(path: str) -> list[tuple[Path, str]]:
    """The files that ``path`` stands for, sorted, each with a short name that ids begin with.

    A directory stands for all data files below it.  Raises :class:`DataError` where there are none, and for a
    directory that holds training and other splits: they would be mixed.
    """
    given = Path(path)
    if given.is_file():
        if _kind(given) not in SUFFIXES:
            raise DataError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}, or these with .gz")
        return [(given, given.name.partition(".")[0] if _gzipped(given) else given.stem)]
    whole = given.is_dir()
    root = path if whole else os.path.dirname(re.split(r"[*?[]", path, maxsplit=1)[0])
    matches = glob(f"{escape(path)}/**" if whole else path, recursive=True)
    found = [os.path.relpath(name, root or ".") for name in matches]
    names = sorted(name for name in found if _is_data(root, name))
    if not names:
        known = f"none that ends in {', '.join(SUFFIXES)}"
        if whole or found:
            raise DataError(f"{path}: {known}")
        beside = os.listdir(root or ".") if os.path.isdir(root or ".") else []
        close = nearest(given.name, [name for name in beside if _is_data(root, name)])
        raise DataError(f"no such data file: {path} (looked in {os.getcwd()}){close}")
    splits = {split[1] for name in names if (split := _SPLIT.search(name.lower()))}
    if whole and "train" in splits and len(splits) > 1:
        example = next(name for name in names if "train" in name.lower())
        raise DataError(
            f"{path} holds several splits ({', '.join(sorted(splits))}): name the files of one, "
            f"for example {given / example}, or a glob"
        )
    return [(Path(root, name), name.partition(".")[0]) for name in names]


def rows(path: Path, damaged: Callable[[DataError], None] | None = None) -> Iterator[tuple[int, str, Row]]:
    """(number from 1, where it stands, the row) of one file; of JSON lines the number is the line's.

    ``damaged``: told of each of the JSON lines that is none (not UTF-8, not JSON, a key twice), which is then
    left out; without it the first one is raised.
    """
    read = {".parquet": _parquet, ".json": _json}.get(_kind(path), _table)
    try:
        yield from _json_lines(path, damaged) if _kind(path) == ".jsonl" else read(path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not readable as gzip: {error}") from error


def _kind(path: Path) -> str:
    return Path(path.stem).suffix.lower() if _gzipped(path) else path.suffix.lower()


def _gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _is_data(root: str, name: str) -> bool:
    """glob leaves out what is hidden."""
    path = Path(root, name)
    return path.is_file() and _kind(path) in SUFFIXES and not _ABOUT.fullmatch(path.name)


def _lines(path: Path, damaged: Callable[[DataError], None] | None = None) -> Iterator[str]:
    """The lines of a text; of one that is not UTF-8 ``damaged`` is told, and it comes as an empty one."""
    with gzip.open(path) if _gzipped(path) else path.open("rb") as file:
        if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            try:
                yield from io.TextIOWrapper(file, "utf-16", newline="")
            except UnicodeError as error:
                raise DataError(f"{path}: not UTF-16, which its first bytes promise: {error}") from error
            return
        for number, line in enumerate(file, 1):
            try:
                yield line.removeprefix(codecs.BOM_UTF8).decode() if number == 1 else line.decode()
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x} at {error.start + 1}"
                fault = DataError(
                    f"{path}, line {number}: not UTF-8 ({byte}): convert the file, for example with "
                    "`iconv -f latin1 -t utf-8`"
                )
                if damaged is None:
                    raise fault from error
                damaged(fault)
                yield ""


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, found a {type(value).__name__}")
    return value


def _json_lines(
    path: Path, damaged: Callable[[DataError], None] | None = None
) -> Iterator[tuple[int, str, Row]]:
    for number, line in enumerate(_lines(path, damaged), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                value = _object(_parsed(line, where), where)
            except DataError as error:
                if damaged is None:
                    raise
                damaged(error)
                continue
            yield number, where, value


def from_json(text: str, *, strict: bool = True) -> Any:
    """What a JSON text says.  Raises ValueError, :class:`KeyTwice` for an object with a key twice, of which
    Python would take the last one.  ``strict``: as of :func:`json.loads`.
    """
    return json.loads(text, strict=strict, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise KeyTwice(f"an object has the key {twice!r} twice: take out the one that is not meant")
    return found


def _parsed(line: str, where: str) -> Any:
    try:
        return from_json(line)
    except KeyTwice as error:
        raise DataError(f"{where}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from error


def _json(path: Path) -> Iterator[tuple[int, str, Row]]:
    """A list of rows; an object that holds one such list, or is a row itself; or JSON lines."""
    text = "".join(_lines(path))
    try:
        value = from_json(text) if text.strip() else []
    except KeyTwice as error:
        raise DataError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _json_lines(path)
            return
        raise DataError(f"{path}: not JSON: {error}") from error
    if isinstance(value, dict):
        lists = [one for one in value.values() if isinstance(one, list) and one and isinstance(one[0], dict)]
        messages = any("role" in one[0] or "from" in one[0] for one in lists)
        value = lists[0] if len(lists) == 1 and not messages else [value]
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of objects, found a {type(value).__name__}")
    for number, one in enumerate(value, 1):
        where = f"{path}, row {number}"
        yield number, where, _object(one, where)


def _parquet(path: Path) -> Iterator[tuple[int, str, Row]]:
    try:
        with gzip.open(path) if _gzipped(path) else path.open("rb") as file, pq.ParquetFile(file) as table:
            number, names = 0, table.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise DataError(f"{path}: two columns are called {twice[0]!r}: rename one")
            for batch in table.iter_batches(batch_size=1024):
                for values in zip(*map(_values, batch.columns), strict=True):
                    number += 1
                    yield number, f"{path}, row {number}", dict(zip(names, values, strict=True))
    except (pa.ArrowException, UnicodeError) as error:
        raise DataError(f"{path}: not readable as Parquet: {error}") from error


def _values(column: pa.Array) -> list[Any]:
    """A column's values; as texts where Python has no such value (nanoseconds, a date in the year 20000)."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        return column.cast(pa.string()).to_pylist()


def _table(path: Path) -> Iterator[tuple[int, str, Row]]:
    """Lines of fields separated by commas or tabs, the first one the columns' names."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_lines(path), delimiter="\t" if _kind(path) == ".tsv" else ",")
    try:
        names = next(reader, [])
        for number, fields in enumerate((fields for fields in reader if fields), 1):
            where = f"{path}, line {reader.line_num}"
            if len(fields) != len(names):
                raise DataError(f"{where}: {len(fields)} fields, but {len(names)} columns have a name")
            yield number, where, dict(zip(names, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error
