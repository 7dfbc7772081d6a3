"""What the model writes, token by token, as an agent reads it: thoughts, text, and calls at the end.

Only this view is cut and sorted: the tokens are recorded as they were sampled.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

from system.rollout.encode import Tokenizer
from system.rollout.syntax.base import ParsedCall, Syntax, bounded

_THOUGHTS = ("think", "thinking", "thought", "reasoning")
_THOUGHT = re.compile(rf"\s*<({'|'.join(_THOUGHTS)})>")
_UNFINISHED = "�"  # a character of which not all bytes are there
_LONGEST = 8  # tokens that may wait for the rest of a character; more are no character


class Delta(NamedTuple):
    """More text of an answer."""

    kind: Literal["reasoning", "text"]
    text: str


@dataclass(frozen=True, slots=True)
class Written:
    """A whole turn, sorted."""

    reasoning: str
    text: str
    calls: tuple[ParsedCall, ...]
    malformed: bool  # it meant a call and wrote none that can be made: its words are in ``text``


class _Phase(Enum):
    START = 0  # nothing but spaces so far
    THOUGHT = 1
    TEXT = 2
    CALLS = 3  # from the first call on
    STOPPED = 4


class AnswerReader:
    """Reads one turn.  Text is told as soon as it cannot be part of a call or of a stop string."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        ends: Collection[int],
        syntax: Syntax | None,
        *,
        stops: Collection[str] = (),
        opened: str = "",
    ) -> None:
        """``ends``: tokens that end a turn.  ``syntax``: of the tools that may be called, if any.  ``stops``:
        strings that end the text, outside thoughts.  ``opened``: what the prompt has opened of the turn
        already (``<think>``).
        """
        self._decoder = _TextOf(tokenizer, ends)
        self._syntax, self._stops = syntax, tuple(stops)
        self._marks = (*(syntax.opens if syntax else ()), *self._stops)
        self._held = ""  # not told yet
        self._searched = 0  # of it, for stop strings, once calls have begun
        self._told: dict[str, list[str]] = {"reasoning": [], "text": []}
        self._bare = False  # spaces at the beginning of what comes are left out
        self._phase, self._close = _Phase.START, ""
        self.stopped = ""  # the stop string that was met
        if found := _THOUGHT.fullmatch(opened.strip()):
            self._think(found[1])

    def feed(self, token: int) -> list[Delta]:
        """The text that a further token makes certain."""
        return self._read(self._decoder.feed(token))

    def finish(self, ended: bool) -> tuple[list[Delta], Written]:
        """The rest of the text, and the whole.  ``ended``: the model ended its turn itself; else a call that
        it had begun, or made, is none.
        """
        deltas = self._read(self._decoder.rest())
        calls: tuple[ParsedCall, ...] = ()
        malformed = False
        if self._phase is _Phase.THOUGHT:
            deltas += self._tell("reasoning", self._held.rstrip())
        elif self._phase is _Phase.CALLS and self._syntax:
            found = calls_in(self._held, self._syntax) if ended else None
            if found:
                calls, outside = found
                if outside:
                    deltas += self._tell("text", ("\n" if self._told["text"] else "") + outside)
            else:
                malformed = ended
                deltas += self._tell("text", self._held)
        elif self._phase is not _Phase.STOPPED:
            deltas += self._tell("text", self._held)
        self._held = ""
        whole = {kind: "".join(parts) for kind, parts in self._told.items()}
        return deltas, Written(whole["reasoning"], whole["text"], calls, malformed)

    def _read(self, new: str) -> list[Delta]:
        deltas: list[Delta] = []
        self._held += new
        before = None
        while before != self._phase:
            before = self._phase
            if before is _Phase.START:
                self._begin()
            elif before is _Phase.THOUGHT:
                deltas += self._in_thought()
            elif before is _Phase.TEXT:
                deltas += self._in_text()
            elif before is _Phase.CALLS:
                deltas += self._in_calls()
            else:
                self._held = ""
        return deltas

    def _begin(self) -> None:
        if found := _THOUGHT.match(self._held):
            self._held = self._held[found.end() :]
            self._think(found[1])
        elif (word := self._held.lstrip()) and not any(f"<{name}>".startswith(word) for name in _THOUGHTS):
            self._phase = _Phase.TEXT

    def _think(self, name: str) -> None:
        self._phase, self._close, self._bare = _Phase.THOUGHT, f"</{name}>", True

    def _in_thought(self) -> list[Delta]:
        thought, closed, rest = self._held.partition(self._close)
        if not closed:
            return self._certain("reasoning", (self._close,))
        deltas = self._tell("reasoning", thought.rstrip())
        self._held, self._phase, self._bare = rest, _Phase.TEXT, True
        return deltas

    def _in_text(self) -> list[Delta]:
        place, mark = _first(self._held, self._marks)
        if not mark:
            return self._certain("text", self._marks)
        before, after = self._held[:place], self._held[place:]
        if mark in self._stops:
            self.stopped, self._phase = mark, _Phase.STOPPED
            return self._tell("text", before)
        text = before.rstrip()
        self._held, self._phase = before[len(text) :] + after, _Phase.CALLS
        return self._tell("text", text)

    def _in_calls(self) -> list[Delta]:
        place, mark = _first(self._held, self._stops, self._searched)
        longest = max(map(len, self._stops), default=1)
        self._searched = max(0, len(self._held) - longest + 1)
        if not mark:
            return []
        text = self._held[:place]
        self.stopped, self._phase = mark, _Phase.STOPPED
        return self._tell("text", text)

    def _certain(self, kind: Literal["reasoning", "text"], marks: Collection[str]) -> list[Delta]:
        """What of the held text is no beginning of one of ``marks``, nor spaces before one."""
        size = len(self._held)
        begun = max(
            (
                n
                for mark in marks
                for n in range(1, min(len(mark), size + 1))
                if self._held.endswith(mark[:n])
            ),
            default=0,
        )
        text = self._held[: size - begun].rstrip()
        self._held = self._held[len(text) :]
        return self._tell(kind, text)

    def _tell(self, kind: Literal["reasoning", "text"], text: str) -> list[Delta]:
        if self._bare:
            text = text.lstrip()
            self._bare = not text
        if not text:
            return []
        self._told[kind].append(text)
        return [Delta(kind, text)]


def calls_in(text: str, syntax: Syntax) -> tuple[tuple[ParsedCall, ...], str] | None:
    """All calls in ``text``, and what is said around them; None where one of them cannot be made."""
    calls: list[ParsedCall] = []
    outside: list[str] = []
    place = 0
    while True:
        begin, opener = _first(text, syntax.opens, place)
        outside.append(text[place : begin if opener else None].strip())
        if not opener:
            return tuple(calls), "\n".join(filter(None, outside))
        end, closer = _first(text, syntax.stops, begin)
        place = end + len(closer)
        found = syntax.parse(text[begin:place]) if closer else None
        call = bounded(found) if found else None
        if not isinstance(call, ParsedCall):
            return None
        calls.append(call)


def _first(text: str, words: Collection[str], start: int = 0) -> tuple[int, str]:
    """Where the first of ``words`` stands in ``text``, and which it is; "" for none."""
    found = [(place, word) for word in words if (place := text.find(word, start)) >= 0]
    return min(found, default=(-1, ""))


class _TextOf:
    """Tokens to text, one by one; a character whose bytes are spread over tokens comes with the last."""

    def __init__(self, tokenizer: Tokenizer, ends: Collection[int]) -> None:
        self._tokenizer, self._ends = tokenizer, frozenset(ends)
        self._ids: list[int] = []
        self._told = 0  # of them, as text
        self._start = 0  # decoding begins here: a token's text may depend on the one before it

    def feed(self, token: int) -> str:
        if token in self._ends:
            return ""
        self._ids.append(token)
        waits = len(self._ids) - self._told < _LONGEST
        return self._new(waits)

    def rest(self) -> str:
        return self._new(False)

    def _new(self, waits: bool) -> str:
        before, whole = self._decode(self._told), self._decode(len(self._ids))
        if waits and whole.endswith(_UNFINISHED):
            return ""
        self._start, self._told = self._told, len(self._ids)
        return whole[len(before) :]

    def _decode(self, end: int) -> str:
        ids = self._ids[self._start : end]
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
