"""Anthropic's messages: ``POST …/v1/messages`` and ``…/v1/messages/count_tokens``."""

from __future__ import annotations

import json
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
    part_text,
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

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_FINISH = {"stop": "end_turn", "length": "max_tokens", "calls": "tool_use"}
_THOUGHTS = ("thinking", "redacted_thinking")


class AnthropicWire:
    name = "anthropic"
    known = frozenset([
        "model", "messages", "system", "tools", "tool_choice", "max_tokens", "stop_sequences", "stream",
        "output_config", "output_format", "mcp_servers", "container"])  # fmt: skip

    def asked(self, body: Mapping[str, Any]) -> ChatRequest:
        form = body.get("output_config")
        if isinstance(form, dict):
            refuse(cast("dict[str, Any]", form), ("format",), CHANGES)
        refuse(body, ("output_format",), CHANGES)
        refuse(body, ("mcp_servers", "container"), "nothing but the model runs here: leave it out")
        said = [NormalMessage("system", text_of(body.get("system"), "system"))]
        for i, one in enumerate(items(body, "messages")):
            said += _messages(one, i)
        choice = body.get("tool_choice")
        return ChatRequest(
            messages=normalised([one for one in said if one.role != "system" or one.text]),
            tools=tuple(_tool(one, i) for i, one in enumerate(items(body, "tools"))),
            model=model_name(body),
            max_tokens=whole_number(body, "max_tokens"),
            stops=stop_strings(body.get("stop_sequences"), "stop_sequences"),
            stream=bool(body.get("stream")),
            temperature=number(body, "temperature"),
            top_p=number(body, "top_p"),
            forced=isinstance(choice, dict) and choice.get("type") != "auto",
        )

    def whole(self, answer: Answer, request: ChatRequest) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        if answer.reasoning:
            content.append({"type": "thinking", "thinking": answer.reasoning, "signature": answer.id})
        if answer.text:
            content.append({"type": "text", "text": answer.text})
        content += [{**_block(call), "input": json.loads(call.arguments)} for call in answer.calls]
        reason, sequence = _stopped(answer)
        return {
            **_head(answer.id, request),
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": _usage(answer),
        }

    def events(self, key: str, request: ChatRequest) -> AnthropicEvents:
        return AnthropicEvents(key, request)

    def error(self, refusal: Refusal) -> dict[str, Any]:
        kind = _KINDS.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": str(refusal)}}


class AnthropicEvents:
    """Blocks one after the other: a thought, a text, a call each."""

    def __init__(self, key: str, request: ChatRequest) -> None:
        self._key, self._head = key, _head(key, request)
        self._blocks = 0  # begun so far
        self._open = ""  # the kind of delta that the open block takes; "": none is open

    def begin(self, prompt_tokens: int) -> bytes:
        usage = {"input_tokens": prompt_tokens, "output_tokens": 0}
        message = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return event({"type": "message_start", "message": message}, "message_start")

    def delta(self, delta: Delta) -> bytes:
        thinks = delta.kind == "reasoning"
        kind = "thinking_delta" if thinks else "text_delta"
        begun = b""
        if self._open != kind:
            block = {"type": "thinking", "thinking": "", "signature": ""}
            begun = self._close() + self._begin(block if thinks else {"type": "text", "text": ""}, kind)
        return begun + self._more({"type": kind, "thinking" if thinks else "text": delta.text})

    def alive(self) -> bytes:
        """A ping, and an empty delta in an open block: some clients count only those."""
        ping = event({"type": "ping"}, "ping")
        if not self._open:
            return ping
        return ping + self._more(
            {"type": self._open, "thinking" if self._open == "thinking_delta" else "text": ""}
        )

    def end(self, answer: Answer) -> bytes:
        parts = [self._close()]
        for call in answer.calls:
            parts.append(self._begin({**_block(call), "input": {}}, "input_json_delta"))
            parts.append(self._more({"type": "input_json_delta", "partial_json": call.arguments}))
            parts.append(self._close())
        reason, sequence = _stopped(answer)
        last = {
            "type": "message_delta",
            "delta": {"stop_reason": reason, "stop_sequence": sequence},
            "usage": _usage(answer),
        }
        parts += [event(last, "message_delta"), event({"type": "message_stop"}, "message_stop")]
        return b"".join(parts)

    def failed(self, refusal: Refusal) -> bytes:
        return event(AnthropicWire().error(refusal), "error")

    def _begin(self, block: Mapping[str, Any], kind: str) -> bytes:
        self._open = kind
        self._blocks += 1
        return event(
            {"type": "content_block_start", "index": self._blocks - 1, "content_block": block},
            "content_block_start",
        )

    def _more(self, delta: Mapping[str, Any]) -> bytes:
        return event(
            {"type": "content_block_delta", "index": self._blocks - 1, "delta": delta}, "content_block_delta"
        )

    def _close(self) -> bytes:
        if not self._open:
            return b""
        signed = b""
        if self._open == "thinking_delta":
            signed = self._more({"type": "signature_delta", "signature": self._key})
        self._open = ""
        return signed + event({"type": "content_block_stop", "index": self._blocks - 1}, "content_block_stop")


def _head(key: str, request: ChatRequest) -> dict[str, Any]:
    return {"id": f"msg_{key}", "type": "message", "role": "assistant", "model": request.model}


def _stopped(answer: Answer) -> tuple[str, str | None]:
    return ("stop_sequence", answer.stopped) if answer.stopped else (_FINISH[answer.finish], None)


def _usage(answer: Answer) -> dict[str, int]:
    return {
        "input_tokens": answer.prompt_tokens - answer.cached_tokens,
        "cache_read_input_tokens": answer.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": answer.tokens,
    }


def _block(call: FunctionCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{call.id}", "name": call.name}


def _messages(given: Mapping[str, Any], number: int) -> list[NormalMessage]:
    """A message in normal form: answers of tools, which stand in one of a user, are messages of their own."""
    where = f"messages[{number}]"
    role = given.get("role")
    if role not in ("user", "assistant", "system"):
        raise Refusal(400, f"{where}.role: expected user, assistant or system", field=f"{where}.role")
    content = given.get("content")
    if not isinstance(content, list):
        return [NormalMessage(role, text_of(content, f"{where}.content"))]
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[FunctionCall] = []
    results: list[NormalMessage] = []
    for i, block in enumerate(cast("list[Any]", content)):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_result" and role == "user":
            text = text_of(block.get("content"), f"{where}.content[{i}].content")
            results.append(NormalMessage("tool", text, call_id=as_text(block.get("tool_use_id"))))
        elif kind == "tool_use" and role == "assistant":
            calls.append(
                FunctionCall(
                    as_text(block.get("name")), canonical(block.get("input") or {}), as_text(block.get("id"))
                )
            )
        elif kind in _THOUGHTS and role == "assistant":
            thoughts.append(as_text(block.get("thinking")))
        else:
            texts.append(part_text(block, f"{where}.content[{i}]"))
    text = "\n".join(texts)
    if role == "assistant":
        return [NormalMessage(role, text, tuple(calls), "\n".join(filter(None, thoughts)))]
    return results + ([NormalMessage(role, text)] if text or not results else [])


def _tool(given: Mapping[str, Any], number: int) -> dict[str, Any]:
    where = f"tools[{number}]"
    if given.get("type") not in (None, "custom"):
        raise Refusal(
            400,
            f"{where}: {given.get('type')!r} is a tool of the provider's, and none runs here",
            field=where,
        )
    return function(given.get("name"), given.get("description"), given.get("input_schema"), where)
