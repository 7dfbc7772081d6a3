"""OpenAI's responses: ``POST …/v1/responses``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

from system.agents.answer import Delta
from system.agents.messages import (
    ChatRequest,
    FunctionCall,
    NormalMessage,
    Refusal,
    canonical,
    function,
    normalised,
    text_of,
)
from system.agents.wire import CHANGES, Answer, event, items, model_name, number, refuse, whole_number
from system.agents.wire_chat import openai_error
from system.text import as_text

_ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}
_TEXTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")
_PREFIX = "resp_"


class ResponsesWire:
    name = "responses"
    known = frozenset([
        "model", "input", "instructions", "tools", "tool_choice", "max_output_tokens", "stream", "text",
        "previous_response_id", "conversation", "prompt", "background"])  # fmt: skip

    def asked(self, body: Mapping[str, Any]) -> ChatRequest:
        refuse(body, ("conversation", "prompt"), "nothing is kept here but this session: send the messages")
        refuse(body, ("background",), "wait for the answer, or stream it")
        form = body.get("text")
        kind = form.get("format") if isinstance(form, dict) else None
        if isinstance(kind, dict) and kind.get("type") != "text":
            raise Refusal(400, f"text.format: {CHANGES}", field="text.format")
        told = body.get("input")
        given = [{"role": "user", "content": told}] if isinstance(told, str) else items(body, "input")
        first = (
            [NormalMessage("system", as_text(body.get("instructions")))] if body.get("instructions") else []
        )
        return ChatRequest(
            messages=normalised([*first, *_messages(given)]),
            tools=tuple(_tool(one, i) for i, one in enumerate(items(body, "tools"))),
            model=model_name(body),
            max_tokens=whole_number(body, "max_output_tokens"),
            stream=bool(body.get("stream")),
            temperature=number(body, "temperature"),
            top_p=number(body, "top_p"),
            forced=body.get("tool_choice") not in (None, "auto"),
            previous=as_text(body.get("previous_response_id")).removeprefix(_PREFIX),
        )

    def whole(self, answer: Answer, request: ChatRequest) -> dict[str, Any]:
        return _response(answer.id, request, answer)

    def events(self, key: str, request: ChatRequest) -> ResponsesEvents:
        return ResponsesEvents(key, request)

    def error(self, refusal: Refusal) -> dict[str, Any]:
        return openai_error(refusal)


class ResponsesEvents:
    """Items one after the other: a thought, a message, a call each."""

    def __init__(self, key: str, request: ChatRequest) -> None:
        self._key, self._request = key, request
        self._count = 0  # of events
        self._items = 0  # begun so far
        self._kind = ""  # of the delta that the open item takes; "": none is open
        self._text = ""  # of the open item

    def begin(self, prompt_tokens: int) -> bytes:
        response = _response(self._key, self._request)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def delta(self, delta: Delta) -> bytes:
        begun = b"" if self._kind == delta.kind else self._close() + self._begin(delta.kind)
        self._text += delta.text
        return begun + self._part(f"{_event_of(self._kind)}.delta", delta=delta.text, **self._logprobs)

    def alive(self) -> bytes:
        return b": the answer is coming\n\n"

    def end(self, answer: Answer) -> bytes:
        parts = [self._close()]
        for item in map(_call, answer.calls):
            where = {"output_index": self._items, "item_id": item["id"]}
            self._items += 1
            begun = {**item, "arguments": "", "status": "in_progress"}
            name = "response.function_call_arguments"
            parts += [
                self._event("response.output_item.added", output_index=where["output_index"], item=begun),
                self._event(f"{name}.delta", **where, delta=item["arguments"]),
                self._event(f"{name}.done", **where, arguments=item["arguments"], name=item["name"]),
                self._event("response.output_item.done", output_index=where["output_index"], item=item),
            ]
        response = _response(self._key, self._request, answer)
        return b"".join([*parts, self._event(f"response.{response['status']}", response=response)])

    def failed(self, refusal: Refusal) -> bytes:
        error = openai_error(refusal)["error"]  # named twice: this is where OpenAI's client looks for it
        return self._event(
            "error", code=error["code"], message=error["message"], param=error["param"], error=error
        )

    @property
    def _logprobs(self) -> dict[str, Any]:
        return {"logprobs": []} if self._kind == "text" else {}

    def _begin(self, kind: str) -> bytes:
        self._kind, self._text = kind, ""
        self._items += 1
        item = {**self._item(), "content": [], "status": "in_progress"}
        added = self._event("response.output_item.added", output_index=self._items - 1, item=item)
        return added + self._part("response.content_part.added", part=_part(kind, ""))

    def _close(self) -> bytes:
        if not self._kind:
            return b""
        done = self._part(f"{_event_of(self._kind)}.done", text=self._text, **self._logprobs)
        done += self._part("response.content_part.done", part=_part(self._kind, self._text))
        done += self._event("response.output_item.done", output_index=self._items - 1, item=self._item())
        self._kind = ""
        return done

    def _item(self) -> dict[str, Any]:
        make = _thought if self._kind == "reasoning" else _said
        return make(self._key, self._text)

    def _part(self, name: str, **more: Any) -> bytes:
        where = {"output_index": self._items - 1, "content_index": 0, "item_id": self._item()["id"]}
        return self._event(name, **where, **more)

    def _event(self, name: str, /, **more: Any) -> bytes:
        self._count += 1
        return event({"type": name, "sequence_number": self._count - 1, **more}, name)


def _event_of(kind: str) -> str:
    return "response.reasoning_text" if kind == "reasoning" else "response.output_text"


def _response(key: str, request: ChatRequest, answer: Answer | None = None) -> dict[str, Any]:
    """The answer as it stands; None: nothing has come so far."""
    output: list[dict[str, Any]] = []
    usage = None
    status = "in_progress"
    if answer is not None:
        output += [_thought(key, answer.reasoning)] if answer.reasoning else []
        output += [_said(key, answer.text)] if answer.text else []
        output += [_call(call) for call in answer.calls]
        status = "incomplete" if answer.finish == "length" else "completed"
        usage = {
            "input_tokens": answer.prompt_tokens,
            "input_tokens_details": {"cached_tokens": answer.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": answer.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": answer.prompt_tokens + answer.tokens,
        }
    return {
        "id": _PREFIX + key,
        "object": "response",
        "created_at": int(time.time()),
        "model": request.model,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": None,
        "metadata": {},
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": _PREFIX + request.previous if request.previous else None,
        "tool_choice": "auto",
        "tools": [],
        "usage": usage,
    }


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _thought(key: str, text: str) -> dict[str, Any]:
    content = [_part("reasoning", text)]
    return {
        "id": f"rs_{key}",
        "type": "reasoning",
        "summary": [],
        "content": content,
        "status": "completed",
    }


def _said(key: str, text: str) -> dict[str, Any]:
    content = [_part("text", text)]
    head = {"id": f"msg_{key}", "type": "message", "role": "assistant"}
    return {**head, "content": content, "status": "completed"}


def _call(call: FunctionCall) -> dict[str, Any]:
    return {
        "id": f"fc_{call.id}",
        "type": "function_call",
        "call_id": f"call_{call.id}",
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


def _messages(given: Sequence[Mapping[str, Any]]) -> list[NormalMessage]:
    """Items in normal form: those of one turn of the model, which stand side by side, are one message."""
    messages: list[NormalMessage] = []
    turn: list[NormalMessage] = []  # items of the model's turn that is being read
    for i, one in enumerate(given):
        message = _message(one, f"input[{i}]")
        if message.role == "assistant":
            turn.append(message)
            continue
        messages += [*_joined(turn), message]
        turn = []
    return messages + _joined(turn)


def _joined(turn: Sequence[NormalMessage]) -> list[NormalMessage]:
    if not turn:
        return []
    texts, thoughts = (
        "\n".join(filter(None, parts))
        for parts in ([one.text for one in turn], [one.reasoning for one in turn])
    )
    return [NormalMessage("assistant", texts, tuple(call for one in turn for call in one.calls), thoughts)]


def _message(given: Mapping[str, Any], where: str) -> NormalMessage:
    kind = given.get("type", "message")
    if kind == "message":
        role = _ROLES.get(as_text(given.get("role")))
        if role is None:
            raise Refusal(400, f"{where}.role: expected one of {', '.join(_ROLES)}", field=f"{where}.role")
        return NormalMessage(role, text_of(given.get("content"), f"{where}.content", _TEXTS))
    if kind == "function_call":
        call = FunctionCall(
            as_text(given.get("name")),
            canonical(given.get("arguments") or {}),
            as_text(given.get("call_id")),
        )
        return NormalMessage("assistant", calls=(call,))
    if kind == "function_call_output":
        text = text_of(given.get("output"), f"{where}.output", _TEXTS)
        return NormalMessage("tool", text, call_id=as_text(given.get("call_id")))
    if kind == "reasoning":
        thought = text_of(given.get("content") or given.get("summary"), f"{where}.content", _TEXTS)
        return NormalMessage("assistant", reasoning=thought)
    raise Refusal(400, f"{where}: {kind!r} is not known here; send messages, calls and outputs", field=where)


def _tool(given: Mapping[str, Any], number: int) -> dict[str, Any]:
    where = f"tools[{number}]"
    if given.get("type") != "function":
        raise Refusal(
            400,
            f"{where}: {given.get('type')!r} is a tool of the provider's, and none runs here",
            field=where,
        )
    told = cast("dict[str, Any]", given)
    return function(told.get("name"), told.get("description"), told.get("parameters"), where)
