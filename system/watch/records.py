"""The records of ``metrics.jsonl`` by column, so that long runs stay small in memory."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from system.observe.sinks import RESUMED
from system.observe.terminal import visible

WHICH = "eval/which"  # the record of an evaluation has it: before, during or after training
_NOT_SERIES = ("step", "version", "time", WHICH)


def number(value: object) -> float | None:
    """``value`` as a float; None for what is no number, or one that no float can hold."""
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return None


class Records:
    """Takes records in the file's order; a resume takes back those past its checkpoint."""

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}  # each key's newest number
        self._step, self._time = array("q"), array("d")
        self._which: list[str] = []  # "" for a training step
        self._counts = bytearray()  # row -> 1 unless a resume took it back
        self._columns: dict[str, tuple[array[int], array[float]]] = {}  # key, safe to show -> (rows, values)

    def __len__(self) -> int:
        return len(self._step)

    def add(self, record: Mapping[str, Any]) -> None:
        if isinstance(back_to := record.get(RESUMED), int):
            for row, step in enumerate(self._step):
                if step > back_to:
                    self._counts[row] = 0
            return
        step, time = record.get("step"), number(record.get("time"))
        if not isinstance(step, int) or abs(step) >= 1 << 63 or time is None:
            return
        row = len(self._step)
        self._step.append(step)
        self._time.append(time)
        self._which.append(str(record.get(WHICH, "")))
        self._counts.append(1)
        for key, value in record.items():
            if key in _NOT_SERIES or (found := number(value)) is None:
                continue
            name = key if key in self._columns else visible(key)
            rows, values = self._columns.setdefault(name, (array("q"), array("d")))
            rows.append(row)
            values.append(found)
            self.latest[name] = found

    @property
    def step(self) -> int:
        """The last training step that has a record; 0 before the first."""
        return max((s for s, which, ok in self._rows() if not which and ok), default=0)

    def _rows(self) -> zip[tuple[int, str, int]]:
        return zip(self._step, self._which, self._counts, strict=True)

    @property
    def span(self) -> tuple[float, float] | None:
        """Unix times of the first and the last record; None without any."""
        return (self._time[0], self._time[-1]) if self._time else None

    def names(self) -> list[str]:
        return sorted(self._columns)

    def series(self, key: str) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """(steps, unix times, values), [n] each, of the records that count and have ``key``."""
        rows, values = self._columns.get(key, (array("q"), array("d")))
        at = np.array(rows, np.int64)
        counts = np.frombuffer(bytes(self._counts), np.uint8)[at] > 0 if at.size else np.zeros(0, bool)
        at, value = at[counts], np.array(values, np.float64)[counts]
        return np.array(self._step, np.int64)[at], np.array(self._time, np.float64)[at], value

    def recent(self, key: str, most: int) -> float | None:
        """The mean of the last ``most`` records that have ``key``; None without any."""
        _, _, value = self.series(key)
        return float(value[-most:].mean()) if value.size else None

    def evaluations(self) -> list[tuple[int, float, str, dict[str, float]]]:
        """(step, unix time, which, its ``eval/`` numbers) of every evaluation that counts."""
        chosen = {
            row: (self._step[row], self._time[row], which, dict[str, float]())
            for row, which in enumerate(self._which)
            if which and self._counts[row]
        }
        for key in self._columns:
            if key.startswith("eval/"):
                for row, value in zip(*self._columns[key], strict=True):
                    if row in chosen:
                        chosen[row][3][key.removeprefix("eval/")] = value
        return list(chosen.values())
