"""Where metric records go: the recorder writes flat records, and a sink keeps or sends them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from system.observe.jsonl import read_jsonl

RESUMED = "resumed_from"  # a record {RESUMED: step}: the run went back to its checkpoint after this step


class Sink(Protocol):
    """``JsonlWriter`` is one: failing to write ``metrics.jsonl`` is an error of the run, for these are its
    results.
    """

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one flat record; it has an integer ``step``, or is the mark of a resume."""
        ...

    def close(self) -> None: ...


def history(path: str | Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl`` that count: a resume takes back those past its checkpoint."""
    records: list[dict[str, Any]] = []
    for record in read_jsonl(path):
        if RESUMED in record:
            records = [one for one in records if one["step"] <= record[RESUMED]]
        else:
            records.append(record)
    return records


def series(records: list[dict[str, Any]], key: str) -> Iterator[tuple[int, float]]:
    """(step, value) of every record that has a number under ``key``."""
    for record in records:
        value = record.get(key)
        if isinstance(value, int | float):
            yield int(record["step"]), float(value)
