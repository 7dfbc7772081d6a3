"""The answers of an evaluation, one by one, and the file that keeps them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from system.errors import ConfigError
from system.tree.prompt import Prompt
from system.tree.record import Outcome
from system.tree.stats import TreeStats

OWN = "held-out"  # the name of the task's own questions, where others stand beside them


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, once: ``sample`` counts its answers from 0, ``seed`` is what this one is sampled with."""

    set: str  # "" for the task's own held-out questions
    prompt: Prompt
    sample: int
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.set, self.prompt.id, self.sample


@dataclass(frozen=True, slots=True)
class Answered:
    """What became of one :class:`Asked`."""

    set: str
    id: str
    kind: str
    sample: int
    correct: bool | None = None  # None: nobody could say; counts as wrong
    reward: float | None = None
    outcome: str = "unanswered"  # the branch's end, or that no attempt came to one
    tool_calls: int | None = None
    tokens: int | None = None  # that the model wrote
    text: str | None = None  # the final answer
    seconds: float | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        return self.set, self.id, self.sample

    @property
    def there(self) -> bool:
        """Whether an answer came, whatever it is worth."""
        return self.outcome != "unanswered"

    @classmethod
    def missing(cls, asked: Asked) -> Answered:
        """No attempt was answered."""
        return cls(asked.set, asked.prompt.id, asked.prompt.kind, asked.sample)

    @classmethod
    def of(cls, asked: Asked, tree: TreeStats) -> Answered:
        """``tree``: of one leaf; without any, nothing was answered."""
        if not tree.leaves:
            return cls.missing(asked)
        reward = float(tree.reward[0])
        return cls(
            *(asked.set, asked.prompt.id, asked.prompt.kind, asked.sample),
            correct=bool(tree.correct[0]) if tree.correct.size else None,
            reward=reward if np.isfinite(reward) else None,
            outcome=Outcome(int(tree.outcome[0])).name.lower(),
            tool_calls=int(tree.calls_per_leaf[0]),
            tokens=int(tree.response_tokens[0]),
            text=tree.answers[0] if tree.answers else None,
            seconds=round(tree.seconds, 3),
        )


def digest(asked: Sequence[Asked]) -> str:
    """SHA-256 of the questions: what is asked, and what would be right."""
    found = hashlib.sha256()
    for one in asked:
        prompt = one.prompt
        about = [one.set, prompt.id, one.sample, prompt.messages, prompt.answers]
        found.update(json.dumps(about, default=str).encode() + b"\n")
    return found.hexdigest()


class AnswerFile:
    """Answers as they come, in JSON lines below a first line that says what is evaluated.

    An evaluation that broke off is gone on with by opening its file again: what stands in it is ``known``.
    Questions that were not answered are asked again.  A file without an answer is begun anew.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        """Raises ConfigError for a file of something else: of other settings, or no evaluation's."""
        self.path, self.known = path, dict[tuple[str, str, int], Answered]()
        about = json.loads(json.dumps(about))  # as it will be read
        if path.exists() and path.stat().st_size:
            whole = self._read(about)
            with path.open("r+b") as file:  # a last line that was torn goes
                file.truncate(whole if self.known else 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("a", encoding="utf-8")
        if not path.stat().st_size:
            self._write({"about": about})

    def _read(self, about: Mapping[str, Any]) -> int:
        """Bytes of the whole lines."""
        first, *others = self.path.read_bytes().splitlines(keepends=True)
        whole = len(first)
        try:
            theirs = json.loads(first)["about"]
            for line in others:
                if not line.endswith(b"\n"):  # torn
                    break
                answer = Answered(**json.loads(line))
                if answer.there:
                    self.known[answer.key] = answer
                whole += len(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.path} holds no answers of an evaluation ({error}): name a new file"
            ) from error
        if self.known:
            self._compare(theirs, about)
        return whole

    def _compare(self, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        if differ := list(_differences(theirs, ours)):
            raise ConfigError(
                f"{self.path} holds the answers of another evaluation: {', '.join(differ[:5])}; "
                "name a new file, or set what it was made with"
            )

    def add(self, answer: Answered) -> None:
        self._write(asdict(answer))

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=True, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _differences(theirs: Any, ours: Any, at: str = "") -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*theirs, *ours}):
            where = f"{at}.{key}" if at else str(key)
            yield from _differences(theirs.get(key), ours.get(key), where)
    elif theirs != ours:
        yield f"{at} was {theirs!r}, and is {ours!r}"
