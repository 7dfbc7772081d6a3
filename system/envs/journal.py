"""What a branch did in its world and was answered: all there is to know of a world that can be built again.

Journals of one tree share their past: a fork's begins with the very same entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from system.envs.protocol import Acted, Message, Observation


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One action and its answer."""

    calls: tuple[Acted, ...]
    text: str
    answer: Observation
    seconds: float  # that it took
    seed: int | None = None  # what the world was told to draw by, right before (:meth:`.World.reseed`)


Journal = tuple[Entry, ...]


def seconds(journal: Journal) -> float:
    """What it takes to do all of it again, about."""
    return sum(entry.seconds for entry in journal)


def difference(was: Observation, now: Observation, normalise: Callable[[str], str]) -> str:
    """What the second time differs in from the first; empty: nothing."""
    before, after = (_compared(one, normalise) for one in (was, now))
    names = ("done", "truncated", "reward", "messages")
    return next(
        (
            f"{name} was {old!r:.300}, now {new!r:.300}"
            for name, old, new in zip(names, before, after, strict=True)
            if old != new
        ),
        "",
    )


def _compared(one: Observation, normalise: Callable[[str], str]) -> tuple[Any, ...]:
    said = [(message.role, message.status, normalise(message.text)) for message in one.messages]
    return one.done, one.truncated, one.reward, said


class Book:
    """Journals written into one list that holds each entry once."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self.entries: list[dict[str, Any]] = []  # JSON-able, if the model's arguments are

    def write(self, journal: Journal) -> list[int]:
        """Where in :attr:`entries` those of ``journal`` stand."""
        return [self._place(entry) for entry in journal]

    def _place(self, entry: Entry) -> int:
        if id(entry) not in self._places:
            self._places[id(entry)] = len(self.entries)
            self.entries.append(asdict(entry))
        return self._places[id(entry)]


def read(entries: Iterable[Mapping[str, Any]]) -> Sequence[Entry]:
    """The inverse of :class:`Book`.  Raises KeyError or TypeError for what is none."""
    found: list[Entry] = []
    for one in entries:
        calls, answer = tuple(Acted(**call) for call in one["calls"]), dict(one["answer"])
        messages = tuple(Message(**message) for message in answer.pop("messages"))
        found.append(Entry(calls, one["text"], Observation(messages, **answer), one["seconds"], one["seed"]))
    return found
