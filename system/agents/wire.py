"""What the wire formats have in common: reading fields of a request, an answer, and events of a stream."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from system.agents.answer import Delta
from system.agents.messages import ChatRequest, FunctionCall, Refusal
from system.text import as_text

MOST_STOPS, LONGEST_STOP = 16, 256


@dataclass(frozen=True, slots=True)
class Answer:
    """A turn as it is handed out."""

    id: str  # without the prefix that a provider gives ids
    reasoning: str
    text: str
    calls: tuple[FunctionCall, ...]
    finish: Literal["stop", "length", "calls"]
    stopped: str  # the client's stop string that was met
    prompt_tokens: int
    cached_tokens: int  # of them, found in the engine's cache
    tokens: int


class Events(Protocol):
    """One answer as a stream of server-sent events, each method's bytes ready to be sent."""

    def begin(self, prompt_tokens: int) -> bytes: ...

    def delta(self, delta: Delta) -> bytes: ...

    def alive(self) -> bytes:
        """Something that says that the answer is still coming."""
        ...

    def end(self, answer: Answer) -> bytes: ...

    def failed(self, refusal: Refusal) -> bytes: ...


class Dialect(Protocol):
    """One provider's words."""

    name: str
    known: frozenset[str]  # fields of a request that have an effect here, or are refused

    def asked(self, body: Mapping[str, Any]) -> ChatRequest:
        """The request in normal form.  Raises :class:`Refusal` naming the field."""
        ...

    def whole(self, answer: Answer, request: ChatRequest) -> dict[str, Any]:
        """The answer in one piece."""
        ...

    def events(self, key: str, request: ChatRequest) -> Events:
        """For an answer with this id."""
        ...

    def error(self, refusal: Refusal) -> dict[str, Any]: ...


def event(data: Mapping[str, Any], name: str = "") -> bytes:
    """A server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def items(body: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The list of objects at ``name``; null or none: empty.  Raises :class:`Refusal`."""
    value = body.get(name)
    found = cast("list[Any]", value) if isinstance(value, list) else None
    if value is not None and (found is None or not all(isinstance(one, dict) for one in found)):
        raise Refusal(400, f"{name}: expected a list of objects", field=name)
    return cast("list[dict[str, Any]]", found or [])


def whole_number(body: Mapping[str, Any], *names: str) -> int | None:
    """The number of at least 1 at the first of ``names`` that is there.  Raises :class:`Refusal`."""
    for name in names:
        if (value := body.get(name)) is not None:
            if type(value) is not int or value < 1:
                raise Refusal(400, f"{name}: expected a whole number of at least 1", field=name)
            return value
    return None


def number(body: Mapping[str, Any], name: str) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value <= 100:
        raise Refusal(400, f"{name}: expected a number between 0 and 100", field=name)
    return float(value)


def stop_strings(value: Any, name: str) -> tuple[str, ...]:
    """Raises :class:`Refusal`."""
    found = [value] if isinstance(value, str) else value or []
    if not isinstance(found, list) or len(found) > MOST_STOPS:
        raise Refusal(400, f"{name}: expected at most {MOST_STOPS} strings", field=name)
    texts = cast("list[Any]", found)
    if not all(isinstance(text, str) and 0 < len(text) <= LONGEST_STOP for text in texts):
        raise Refusal(400, f"{name}: expected strings of 1 to {LONGEST_STOP} characters", field=name)
    return tuple(as_text(text) for text in texts)


def model_name(body: Mapping[str, Any]) -> str:
    """Raises :class:`Refusal`."""
    name = body.get("model")
    if not isinstance(name, str) or not name:
        raise Refusal(400, "model: name the model, for instance espalier", field="model")
    return name


def refuse(body: Mapping[str, Any], fields: Collection[str], why: str) -> None:
    """Raises :class:`Refusal` where one of ``fields`` is asked for: not missing, null, false or empty."""
    for name in fields:
        if body.get(name):
            raise Refusal(400, f"{name}: {why}", field=name)


CHANGES = (
    "it changes the distribution that the recorded log-probabilities describe, so it is not served: leave it "
    "out"
)
