"""OpenAI's chat completions: ``POST …/v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import Mapping
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
from system.agents.wire import (
    CHANGES,
    Answer,
    event,
    items,
    model_name,
    number,
    refuse,
    stop_strings,
    whole_number,
)
from system.text import as_text

_ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_FINISH = {"stop": "stop", "length": "length", "calls": "tool_calls"}
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}


class ChatWire:
    name = "chat"
    known = frozenset([
        "model", "messages", "tools", "tool_choice", "max_tokens", "max_completion_tokens", "stop",
        "stream", "stream_options", "n", "logit_bias", "response_format", "functions", "function_call",
        "audio"])  # fmt: skip

    def asked(self, body: Mapping[str, Any]) -> ChatRequest:
        if body.get("n") not in (None, 1):
            raise Refusal(400, "n: one answer to a request; ask again for another one", field="n")
        refuse(body, ("logit_bias",), CHANGES)
        form = body.get("response_format")
        if form and (not isinstance(form, dict) or form.get("type") != "text"):
            raise Refusal(400, f"response_format: {CHANGES}", field="response_format")
        refuse(body, ("functions", "function_call"), "send tools and tool_choice")
        refuse(body, ("audio",), "the model reads and writes text")
        options = body.get("stream_options")
        return ChatRequest(
            messages=normalised([_message(one, i) for i, one in enumerate(items(body, "messages"))]),
            tools=tuple(_tool(one, i) for i, one in enumerate(items(body, "tools"))),
            model=model_name(body),
            max_tokens=whole_number(body, "max_completion_tokens", "max_tokens"),
            stops=stop_strings(body.get("stop"), "stop"),
            stream=bool(body.get("stream")),
            temperature=number(body, "temperature"),
            top_p=number(body, "top_p"),
            forced=body.get("tool_choice") not in (None, "auto"),
            usage=isinstance(options, dict) and bool(options.get("include_usage")),
        )

    def whole(self, answer: Answer, request: ChatRequest) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.text or (None if answer.calls else ""),
            "refusal": None,
        }
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = [_call(call) for call in answer.calls]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": _FINISH[answer.finish],
        }
        head = _head(answer.id, request, "chat.completion")
        return {**head, "choices": [choice], "usage": _usage(answer)}

    def events(self, key: str, request: ChatRequest) -> ChatEvents:
        return ChatEvents(key, request)

    def error(self, refusal: Refusal) -> dict[str, Any]:
        return openai_error(refusal)


class ChatEvents:
    def __init__(self, key: str, request: ChatRequest) -> None:
        self._head, self._usage = _head(key, request, "chat.completion.chunk"), request.usage

    def begin(self, prompt_tokens: int) -> bytes:
        return self._chunk({"role": "assistant", "content": ""})

    def delta(self, delta: Delta) -> bytes:
        return self._chunk({"reasoning_content" if delta.kind == "reasoning" else "content": delta.text})

    def alive(self) -> bytes:
        return b": the answer is coming\n\n"

    def end(self, answer: Answer) -> bytes:
        calls = [
            self._chunk({"tool_calls": [{"index": i, **_call(call)}]}) for i, call in enumerate(answer.calls)
        ]
        last = self._chunk({}, _FINISH[answer.finish])
        usage = event({**self._head, "choices": [], "usage": _usage(answer)}) if self._usage else b""
        return b"".join([*calls, last, usage, b"data: [DONE]\n\n"])

    def failed(self, refusal: Refusal) -> bytes:
        return event(openai_error(refusal))

    def _chunk(self, delta: Mapping[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event({**self._head, "choices": [choice]})


def openai_error(refusal: Refusal) -> dict[str, Any]:
    """An error as OpenAI's clients know errors."""
    kind = _KINDS.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "server_error")
    return {
        "error": {
            "message": str(refusal),
            "type": kind,
            "param": refusal.field or None,
            "code": refusal.code or None,
        }
    }


def _head(key: str, request: ChatRequest, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{key}", "object": kind, "created": int(time.time()), "model": request.model}


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.tokens,
        "total_tokens": answer.prompt_tokens + answer.tokens,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


def _call(call: FunctionCall) -> dict[str, Any]:
    return {
        "id": f"call_{call.id}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _message(given: Mapping[str, Any], number: int) -> NormalMessage:
    where = f"messages[{number}]"
    role = _ROLES.get(as_text(given.get("role")))
    if role is None:
        raise Refusal(400, f"{where}.role: expected one of {', '.join(_ROLES)}", field=f"{where}.role")
    text = text_of(given.get("content"), f"{where}.content", ("text", "refusal"))
    if role == "tool":
        return NormalMessage(role, text, call_id=as_text(given.get("tool_call_id")))
    if role != "assistant":
        return NormalMessage(role, text)
    calls = tuple(_called(one, where) for one in items(given, "tool_calls"))
    thought = given.get("reasoning_content") or given.get("reasoning")
    return NormalMessage(role, text, calls, as_text(thought) if isinstance(thought, str) else "")


def _called(given: Mapping[str, Any], where: str) -> FunctionCall:
    told = given.get("function")
    if not isinstance(told, dict) or not isinstance(told.get("name"), str):
        name = f"{where}.tool_calls"
        raise Refusal(400, f"{name}: expected calls of functions, with a name", field=name)
    function = cast("dict[str, Any]", told)
    return FunctionCall(
        function["name"], canonical(function.get("arguments") or {}), as_text(given.get("id"))
    )


def _tool(given: Mapping[str, Any], number: int) -> dict[str, Any]:
    where = f"tools[{number}]"
    told = given.get("function")
    if given.get("type") != "function" or not isinstance(told, dict):
        raise Refusal(400, f"{where}: expected a tool of type function", field=where)
    found = cast("dict[str, Any]", told)
    return function(found.get("name"), found.get("description"), found.get("parameters"), where)
