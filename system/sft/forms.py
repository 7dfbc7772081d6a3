"""A row of a data set as a :class:`Conversation`: ShareGPT, OpenAI's messages, prompt and completion, Alpaca.

Each form becomes messages of OpenAI's kind; what a row has that no conversation can have is refused with the
reason.  ``sft.form`` names the form where the columns leave a doubt, ``sft.columns`` other columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from system.plugins import nearest
from system.tasks.columns import RowUnusable, find, repair, whole_text
from system.tasks.files import DataError, KeyTwice, Row, from_json

Message = dict[str, Any]
COLUMNS = {
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
    "prompt": ("prompt", "question"),
    "completion": ("completion", "response", "output"),
    "instruction": ("instruction",),
    "input": ("input",),
    "output": ("output", "response"),
}
"""What ``sft.columns`` may name -> the usual columns."""
_SPEAKERS = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of system, user, assistant and tool, of which the assistant's are learned."""

    where: str  # the file and line that it was read from
    messages: tuple[
        Message, ...
    ]  # role, content; tool_calls (arguments as objects), reasoning_content, weight
    tools: tuple[dict[str, Any], ...] = ()  # that the row tells of, as chat templates know them

    @property
    def question(self) -> tuple[Message, ...]:
        """What stands before the assistant's first message."""
        first = next(i for i, message in enumerate(self.messages) if message["role"] == "assistant")
        return self.messages[:first]

    def key(self) -> str:
        """The conversation as a text, to tell whether another is the same."""
        return json.dumps([self.messages, self.tools], sort_keys=True, ensure_ascii=False)


class Forms:
    """How rows are read."""

    def __init__(self, form: str = "auto", named: Mapping[str, str] | None = None) -> None:
        """``form``, ``named``: ``sft.form``, ``sft.columns``.  Raises :class:`DataError` for a column of no
        known role.
        """
        self._form, self._named = form, dict(named or {})
        for role in self._named:
            if role not in COLUMNS:
                close = nearest(str(role), COLUMNS)
                raise DataError(f"sft.columns.{role}: it may name {', '.join(COLUMNS)}{close}")

    def conversation(self, row: Row, where: str) -> Conversation:
        """Raises :class:`RowUnusable` with the reason."""
        try:
            return self._conversation(repair(row), where)
        except KeyTwice as error:
            raise RowUnusable(f"{where}: {error}") from error

    def _conversation(self, row: Row, where: str) -> Conversation:
        form = self._form if self._form != "auto" else self._recognised(row, where)
        if form in ("sharegpt", "messages"):
            value = self._value(row, "messages")
            if not isinstance(value := _parsed(value), list) or not value:
                raise RowUnusable(f"{where}: {form} wants a list of messages in {self._names('messages')}")
            said = [_message(one, f"{where}, message {i}") for i, one in enumerate(value, 1)]
        elif form == "completion":
            asked, answered = self._value(row, "prompt"), self._value(row, "completion")
            said = [
                *_texts(asked, "user", where, "prompt"),
                *_texts(answered, "assistant", where, "completion"),
            ]
        else:
            asked, more = self._text(row, "instruction", where), self._value(row, "input")
            question = f"{asked}\n{more}" if isinstance(more, str) and more.strip() else asked
            said = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": self._text(row, "output", where)},
            ]
        system = self._value(row, "system")
        if isinstance(system, str) and system.strip() and said[0]["role"] != "system":
            said.insert(0, {"role": "system", "content": system})
        messages = tuple(_joined(said, where))
        _check(messages, where)
        made = Conversation(where, messages, _tools(self._value(row, "tools"), where))
        try:
            made.key().encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(error.object[error.start]):04X}"
            raise RowUnusable(
                f"{where}: a text holds half of a character ({half}, a lone surrogate)"
            ) from None
        return made

    def _recognised(self, row: Row, where: str) -> str:
        """The form by the columns that a row has."""
        if isinstance(value := _parsed(self._value(row, "messages")), list) and value:
            first = value[0]
            return "sharegpt" if isinstance(first, Mapping) and "from" in first else "messages"
        if self._value(row, "instruction") is not None and self._value(row, "output") is not None:
            return "alpaca"
        if self._value(row, "prompt") is not None and self._value(row, "completion") is not None:
            return "completion"
        columns = ", ".join(map(str, row)) or "none"
        raise RowUnusable(
            f"{where}: no conversation: expected messages or conversations, prompt and completion, or "
            f"instruction and output; found: {columns}; sft.columns names others"
        )

    def _names(self, role: str) -> str:
        return self._named.get(role) or " or ".join(COLUMNS[role])

    def _value(self, row: Row, role: str) -> Any:
        names = (self._named[role],) if role in self._named else COLUMNS[role]
        return next((value for name in names if name and (value := find(row, name)) is not None), None)

    def _text(self, row: Row, role: str, where: str) -> str:
        value = self._value(row, role)
        if not isinstance(value, str) or not value.strip():
            raise RowUnusable(f"{where}: expected a text that is not empty in {self._names(role)}")
        return value


def _message(value: Any, where: str) -> Message:
    """One message in OpenAI's terms, of ShareGPT's or its own."""
    if not isinstance(value, Mapping):
        raise RowUnusable(f"{where}: expected {{role, content}} or {{from, value}}")
    speaker = value.get("role", value.get("from"))
    content = whole_text(value.get("content", value.get("value")))
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowUnusable(f"{where}: {str(speaker)[:40]!r} is no role: {', '.join(_SPEAKERS)}")
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(_parsed(content), where)}
    message: Message = {"role": role, "content": content}
    if role == "assistant":
        if calls := value.get("tool_calls"):
            message |= {"content": content or "", "tool_calls": _calls(_parsed(calls), where)}
        message |= _thought(value.get("reasoning_content"), message["content"], where)
        if value.get("weight") not in (None, 0, 1):
            raise RowUnusable(
                f"{where}: weight is {value['weight']!r}: 1, or 0 for a turn that is not learned"
            )
        if value.get("weight") == 0:
            message["weight"] = 0
    elif isinstance(name := value.get("name"), str) and name:
        message["name"] = name
    if role == "tool" and (answered := value.get("tool_call_id")) not in (None, ""):
        message["tool_call_id"] = str(answered)
    if not isinstance(message["content"], str):
        raise RowUnusable(f"{where}: the content is no text")
    return message


def _thought(value: Any, content: Any, where: str) -> Message:
    """What a ``reasoning_content`` adds to a message of ``content``."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if not isinstance(value, str):
        raise RowUnusable(f"{where}: reasoning_content is no text")
    if isinstance(content, str) and ("<think>" in content or "</think>" in content):
        raise RowUnusable(
            f"{where}: a thought stands in reasoning_content, and one in the content (<think>): a chat "
            "template would write either of them; keep one"
        )
    return {"content": content or "", "reasoning_content": value}


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls as OpenAI has them, their arguments as objects."""
    made: list[dict[str, Any]] = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise RowUnusable(
                f"{where}: a tool call is {{name, arguments}} as JSON, found {str(call)[:60]!r}"
            )
        try:
            arguments = _parsed(function.get("arguments", {}))
        except KeyTwice as error:
            raise RowUnusable(f"{where}: the arguments of the call of {name!r}: {error}") from error
        if not isinstance(arguments, Mapping):
            raise RowUnusable(f"{where}: the arguments of the call of {name!r} are no JSON object")
        made.append({"type": "function", "function": {"name": name, "arguments": dict(arguments)}})
        if call.get("id") not in (None, ""):
            made[-1]["id"] = str(call["id"])
    return made


def _texts(value: Any, role: str, where: str, column: str) -> list[Message]:
    """A column that is a text of ``role``, or messages."""
    value = _parsed(value) if isinstance(value, str) and value.lstrip()[:2] == "[{" else value
    if isinstance(value, str) and value.strip():
        return [{"role": role, "content": value}]
    if isinstance(value, list) and value:
        return [_message(one, f"{where}, {column}[{i}]") for i, one in enumerate(value)]
    raise RowUnusable(
        f"{where}: the column {column} is neither a text nor a list of messages, or it is empty"
    )


def _joined(said: Sequence[Message], where: str) -> Iterator[Message]:
    """ShareGPT's thought and call, messages one behind the other, are one of the assistant's; calls and their
    answers get ids that agree.
    """
    joined: list[Message] = []
    for message in said:
        last = joined[-1] if joined else None
        if last and last["role"] == message["role"] == "assistant":
            if last.get("tool_calls") or not message.get("tool_calls") or message["content"]:
                raise RowUnusable(f"{where}: two messages of the assistant stand one behind the other")
            last["tool_calls"] = message["tool_calls"]
        else:
            joined.append(dict(message))
    number, first = 0, 0
    while first < len(joined):
        behind = range(first + 1, len(joined))
        last = next((i for i in behind if joined[i]["role"] == "assistant"), len(joined))
        calls = joined[first].get("tool_calls", [])
        places = [i for i in range(first + 1, last) if joined[i]["role"] == "tool"]
        paired = _paired(calls, [joined[i] for i in places], where)
        for place, (answer, call) in zip(places, paired, strict=True):
            joined[place] = answer
            answer.pop("tool_call_id", None)
            if call is not None:
                answer["tool_call_id"] = f"call{number + call:05d}"
        for call in calls:
            call["id"] = f"call{number:05d}"
            number += 1
        first = last
    yield from joined


def _paired(
    calls: Sequence[Mapping[str, Any]], answers: Sequence[Message], where: str
) -> list[tuple[Message, int | None]]:
    """The answers to ``calls`` of one message, in the order of these, as a rollout has them, each with the
    number of its call (None: there is none left).  Where both sides have ids these say which is whose.

    Raises :class:`RowUnusable` for ids that do not agree.
    """
    known = [call.get("id") for call in calls]
    named = [answer.get("tool_call_id") for answer in answers]
    if not any(known) or not any(named):
        return [(answer, i if i < len(calls) else None) for i, answer in enumerate(answers)]
    for what, ids in (("calls have", known), ("answers are to", named)):
        if twice := [one for one in ids if one is not None and ids.count(one) > 1]:
            raise RowUnusable(
                f"{where}: two {what} the id {twice[0]!r}: which answer is whose cannot be told"
            )
    for one in named:
        if one is None or one not in known:
            to = "has no tool_call_id" if one is None else f"is to {one!r} (tool_call_id)"
            ids = ", ".join(map(repr, known))
            raise RowUnusable(
                f"{where}: an answer of a tool {to}, and the calls before it have the ids {ids}"
            )
    order = sorted(range(len(answers)), key=lambda i: known.index(named[i]))
    return [(answers[i], known.index(named[i])) for i in order]


def _check(messages: Sequence[Message], where: str) -> None:
    """Raises :class:`RowUnusable` for messages that are no conversation."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise RowUnusable(f"{where}: no message of the assistant: there is nothing to learn")
    first = roles.index("assistant")
    if "user" not in roles[:first]:
        raise RowUnusable(f"{where}: no message of a user comes before the assistant's first one")
    if roles[-1] != "assistant":
        raise RowUnusable(f"{where}: it ends with a message of the {roles[-1]}, not of the assistant")
    if "tool" in roles[:first]:
        raise RowUnusable(f"{where}: a tool answers before the assistant has said anything")
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant" and not (message["content"].strip() or message.get("tool_calls")):
            raise RowUnusable(f"{where}, message {number}: the assistant says nothing")
    if all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
        raise RowUnusable(f"{where}: every message of the assistant has weight 0")


def _tools(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Tools of a row, each with its ``function``."""
    value = _parsed(value)
    if value in (None, "", []):
        return ()
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        raise RowUnusable(f"{where}: tools is no list of schemas, nor JSON of one")
    return tuple(
        dict(one) if isinstance(one.get("function"), Mapping) else {"type": "function", "function": dict(one)}
        for one in value
    )


def _parsed(value: Any) -> Any:
    """What ``value`` is the JSON text of; else as it is.  Raises :class:`KeyTwice`."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return from_json(value, strict=False)
        except KeyTwice:
            raise
        except (ValueError, RecursionError):
            return value
    return value
