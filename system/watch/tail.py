"""A growing file of JSON lines, each line read once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20  # bytes read at a time


class JsonlTail:
    """Reads what was appended since the last look; a torn last line waits until it is whole.

    A line that is not a JSON object is left out and counted: a page about a damaged run is better than none.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.bad = path, 0
        self._at, self._file = 0, 0  # bytes read, inode

    def restarted(self) -> bool:
        """Whether it is another file, or shorter than what was read: then it is read from the beginning."""
        try:
            stat = self.path.stat()
        except OSError:
            return False
        restarted = bool(self._file) and (stat.st_ino != self._file or stat.st_size < self._at)
        if restarted:
            self._at = 0
        self._file = stat.st_ino
        return restarted

    def news(self) -> Iterator[dict[str, Any]]:
        """The records of the lines that are whole by now, in order; none of a file that is not there."""
        try:
            file = self.path.open("rb")
        except OSError:
            return
        with file:
            file.seek(self._at)
            torn = b""
            while block := file.read(_BLOCK):
                whole, newline, rest = block.rpartition(b"\n")
                if not newline:
                    torn += block
                    continue
                lines, torn = torn + whole + newline, rest
                self._at += len(lines)
                yield from self._records(lines)

    def _records(self, lines: bytes) -> Iterator[dict[str, Any]]:
        for line in lines.splitlines():
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # it is none, or is nested too deeply
                record = None
            if isinstance(record, dict):
                yield record
            else:
                self.bad += 1
