"""A request in normal form: the same whichever provider's words it came in, and however a client writes it.

Clients say the same thing in many ways: a content as text or as a list of parts, null or "", arguments with
other spaces, a system message in a place of its own, ids of their own making.  Two requests mean the same iff
their normal forms are equal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, cast

from system.errors import EspalierError
from system.text import as_text
from system.tools.outcome import ToolSpec

ROLES = ("system", "user", "assistant", "tool")


class Refusal(EspalierError):
    """A request that is not served.  Each provider's error is made of it."""

    def __init__(self, status: int, message: str, *, code: str = "", field: str = "") -> None:
        """``status``: of HTTP; ``code``: a word for programs; ``field``: of the request, at fault."""
        super().__init__(message)
        self.status, self.code, self.field = status, code, field


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A tool call as the model made it, or as a client says that it did."""

    name: str
    arguments: str  # canonical JSON of an object; what is none stays as it is written
    id: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class NormalMessage:
    role: str  # one of ROLES
    text: str = ""
    calls: tuple[FunctionCall, ...] = ()  # of the assistant
    reasoning: str = ""  # of the assistant: what it thought, where the client says that
    call_id: str = ""  # of a tool's answer: what it answers
    tool: str = ""  # of a tool's answer: the tool's name, where the request tells

    @property
    def key(self) -> bytes:
        """Equal for two messages that mean the same; thoughts and ids aside."""
        text = self.text.strip() if self.role == "assistant" else self.text
        calls = [(call.name, call.arguments) for call in self.calls]
        return json.dumps([self.role, text, calls]).encode()

    def rendered(self) -> dict[str, Any]:
        """As chat templates know messages."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [_templated(call) for call in self.calls]
        if self.role == "tool":
            message |= {"tool_call_id": self.call_id, "name": self.tool}
        return message


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What a client asks for."""

    messages: tuple[NormalMessage, ...]
    tools: tuple[Mapping[str, Any], ...] = ()  # as chat templates know tools
    model: str = ""
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()  # the text is cut before the first of these
    stream: bool = False
    temperature: float | None = None  # this and the next count for the model that is not trained only
    top_p: float | None = None
    forced: bool = False  # a tool choice other than "auto", which is not enforced
    usage: bool = False  # a stream is to tell of its tokens
    previous: str = ""  # the id of the answer that these messages come behind; "": they are all there are

    def prefixes(self) -> list[bytes]:
        """A digest for each beginning of the messages, from none of them to all: equal beginnings, told the
        same tools, have equal digests.
        """
        digests = [sha256(json.dumps(self.tools, sort_keys=True).encode()).digest()]
        for message in self.messages:
            digests.append(sha256(digests[-1] + message.key).digest())
        return digests

    def specs(self) -> dict[str, ToolSpec]:
        """The tools, by name."""
        return {spec.name: spec for spec in map(_spec, self.tools)}


def canonical(arguments: Any) -> str:
    """Arguments, an object or the JSON text of one, as canonical JSON; text that is no JSON as it is."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return arguments
    return json.dumps(valid(arguments), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def normalised(messages: Sequence[NormalMessage]) -> tuple[NormalMessage, ...]:
    """``messages`` with what stands before the first turn in one system message, and with the tools' names
    beside their answers.

    Raises :class:`Refusal` for none, and where the last one is the model's own.
    """
    first = next((i for i, one in enumerate(messages) if one.role != "system"), len(messages))
    told = "\n\n".join(one.text for one in messages[:first] if one.text)
    rest = list(messages[first:])
    if not rest:
        raise Refusal(400, "messages: there is none of a user", field="messages")
    if rest[-1].role == "assistant":
        raise Refusal(
            400,
            "messages: the last one is the model's own, and its turns are not gone on with: end with one of "
            "a user or a tool",
            field="messages",
        )
    names = {call.id: call.name for one in rest for call in one.calls if call.id}
    whole = ([NormalMessage("system", told)] if told else []) + [
        NormalMessage("tool", one.text, call_id=one.call_id, tool=one.tool or names.get(one.call_id, ""))
        if one.role == "tool"
        else one
        for one in rest
    ]
    return tuple(whole)


def valid(value: Any) -> Any:
    """A JSON value with texts that UTF-8 can hold."""
    if isinstance(value, dict):
        return {as_text(key): valid(one) for key, one in value.items()}
    if isinstance(value, list):
        return [valid(one) for one in cast("list[Any]", value)]
    return as_text(value) if isinstance(value, str) else value


def function(name: Any, description: Any, parameters: Any, where: str) -> dict[str, Any]:
    """A tool as chat templates know tools.  Raises :class:`Refusal` naming ``where``."""
    if not isinstance(name, str) or not name:
        raise Refusal(400, f"{where}: a tool needs a name", field=where)
    if parameters is not None and not isinstance(parameters, dict):
        raise Refusal(400, f"{where}: the parameters of {name!r} are no JSON schema", field=where)
    schema = cast("dict[str, Any]", parameters or {"type": "object", "properties": {}})
    if not isinstance(schema.get("properties", {}), dict):
        raise Refusal(400, f"{where}: the properties of {name!r} are no JSON object", field=where)
    return {
        "type": "function",
        "function": {"name": name, "description": as_text(description), "parameters": schema},
    }


def text_of(content: Any, where: str, kinds: Sequence[str] = ("text",)) -> str:
    """The text of a content: a text, null, or a list of parts of these ``kinds``, a line each.

    Raises :class:`Refusal` for parts of other kinds: the model reads text only.
    """
    if content is None or isinstance(content, str):
        return as_text(content)
    if not isinstance(content, list):
        raise Refusal(400, f"{where}: expected a text or a list of parts", field=where)
    return "\n".join(
        part_text(part, f"{where}[{i}]", kinds) for i, part in enumerate(cast("list[Any]", content))
    )


def part_text(part: Any, where: str, kinds: Sequence[str] = ("text",)) -> str:
    """The text of one part of a content.  Raises :class:`Refusal` as :func:`text_of` does."""
    if isinstance(part, str):
        return as_text(part)
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in kinds:
        raise Refusal(400, f"{where}: the model reads text, and this is of type {kind!r}", field=where)
    return as_text(part.get("text", part.get("refusal", "")))


def _spec(tool: Mapping[str, Any]) -> ToolSpec:
    told = tool["function"]
    schema = told["parameters"]
    required, properties = schema.get("required"), schema.get("properties", {})
    names = [*(required if isinstance(required, list) else ()), *properties]
    return ToolSpec(
        told["name"],
        told["description"],
        schema,
        primary=next((n for n in names if isinstance(n, str)), "input"),
    )


def _templated(call: FunctionCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = call.arguments
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
