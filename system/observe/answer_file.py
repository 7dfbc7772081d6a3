"""The file that keeps the answers of an evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from system.errors import ConfigError
from system.evals.record import Answered
from system.observe.jsonl import JsonlError, JsonlWriter, read_jsonl


class AnswerFile:
    """Answers as they come, in JSON lines below a first line that says what is evaluated.

    An evaluation that broke off is gone on with by opening its file again: what stands in it is ``known``.
    Questions that were not answered are asked again.  A file without an answer is begun anew.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        """Raises ConfigError for a file of something else: of other settings, or no evaluation's."""
        self._path, self.known = path, dict[tuple[str, str, int], Answered]()
        about = json.loads(json.dumps(about))  # as it will be read
        if path.exists() and path.stat().st_size:
            self._read(about)
            if not self.known:
                os.truncate(path, 0)
        self._lines = JsonlWriter(path)
        if not path.stat().st_size:
            self._lines.write({"about": about})

    def _read(self, about: Mapping[str, Any]) -> None:
        lines = read_jsonl(self._path)
        try:
            theirs = next(lines, {})["about"]
            answers = [Answered(**line) for line in lines]
            self.known = {answer.key: answer for answer in answers if answer.there}
        except (JsonlError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self._path} holds no answers of an evaluation ({error}): name a new file"
            ) from error
        if self.known and (differ := list(_differences(theirs, about))):
            raise ConfigError(
                f"{self._path} holds the answers of another evaluation: {', '.join(differ[:5])}; "
                "name a new file, or set what it was made with"
            )

    def add(self, answer: Answered) -> None:
        self._lines.write(asdict(answer))

    def close(self) -> None:
        self._lines.close()


def _differences(theirs: Any, ours: Any, at: str = "") -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*theirs, *ours}):
            where = f"{at}.{key}" if at else str(key)
            yield from _differences(theirs.get(key), ours.get(key), where)
    elif theirs != ours:
        yield f"{at} was {theirs!r}, and is {ours!r}"
