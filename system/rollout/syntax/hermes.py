"""Hermes function calling, as Qwen2.5 and Qwen3 were trained on.

A call is ``<tool_call>{"name": …, "arguments": {…}}</tool_call>`` in a ChatML turn; the answer comes back as
``<tool_response>`` in a user turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from system.rollout.syntax.base import MalformedCall, ParsedCall, Syntax, function_schema
from system.tools.outcome import ToolSpec

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FORM = '{"name": <tool>, "arguments": {...}}'
_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
ONE = {
    False: "one call at a time: wait for its result, then make the next",
    True: f"write each call in {OPEN} and {CLOSE} of its own",
}


class HermesSyntax(Syntax):
    """Generation stops at ``</tool_call>``.  The end of the model's turn and the opening of its next one are
    inserted with the result, so the model makes one call at a time.  (With ``rollout.calls_per_turn=many`` it
    ends its turn itself.)

    What can be meant in one way only is taken so: arguments as JSON text, ``parameters`` for ``arguments``,
    OpenAI's ``{"type": "function", "function": {…}}``, a list of one call, a Markdown fence, line breaks
    within a string.
    """

    stops = (CLOSE,)
    opens: tuple[str, ...] = (OPEN,)
    result_open = "<|im_end|>\n<|im_start|>user\n<tool_response>\n"
    result_close = "\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    new_turn = True
    in_text = (
        r"\s*(?:<\|im_end\|>\s*<\|im_start\|>(?:user|tool)\s*)?<tool_response>\n?",
        r"\n?</tool_response>(?:\s*<\|im_end\|>\s*<\|im_start\|>assistant\n)?",
    )
    message_open = "\n<|im_start|>user\n"
    message_close = "<|im_end|>\n<|im_start|>assistant\n"

    def parse(self, segment_text: str) -> ParsedCall | MalformedCall | None:
        end = segment_text.rfind(CLOSE)
        if end < 0:
            return None
        _, found, content = segment_text[:end].rpartition(OPEN)
        if not found or CLOSE in content:
            return MalformedCall(f"{CLOSE} without {OPEN}")
        return self._read(content)

    def _read(self, content: str) -> ParsedCall | MalformedCall:
        """The call that stands between the tags."""
        fenced = _FENCED.fullmatch(content.strip())
        text = fenced[1] if fenced else content.strip()
        try:
            call, end = json.JSONDecoder(strict=False).raw_decode(text)
        except json.JSONDecodeError as error:
            where = f"{error.msg}, line {error.lineno}, column {error.colno}, at {_near(text, error.pos)}"
            return MalformedCall(f"the tool call is not valid JSON: {where}; write {FORM}")
        except (ValueError, RecursionError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"
            return MalformedCall(f"the tool call is not valid JSON: {why}; write {FORM}")
        if rest := text[end:].strip():
            if rest[0] in "{[,":
                return MalformedCall(f"several calls in one {OPEN}: {ONE[self.several]}")
            return MalformedCall(
                f"the tool call goes on after its end, at {_near(rest, 0)}; write only {FORM}"
            )
        if isinstance(call, list) and len(call) > 1:
            return MalformedCall(f"a list of {len(call)} calls: {ONE[self.several]}")
        return self._checked(call[0] if isinstance(call, list) and call else call)

    def _checked(self, call: Any) -> ParsedCall | MalformedCall:
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            call = call["function"]
        if not isinstance(call, dict) or not isinstance(name := call.get("name"), str):
            return MalformedCall(f'a tool call needs a "name": write {FORM}')
        if name not in self.specs:
            return self.unknown(name)
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            with suppress(ValueError, RecursionError):  # refused below
                arguments = json.loads(arguments, strict=False)
        if not isinstance(arguments, dict):
            kind = type(arguments).__name__
            return MalformedCall(f'"arguments" must be a JSON object, not a {kind}: write {FORM}')
        return ParsedCall(name, arguments)

    def write(self, call: ParsedCall) -> str:
        made = {"name": call.tool, "arguments": call.arguments}
        return f"{OPEN}\n{json.dumps(made, ensure_ascii=False)}\n{CLOSE}"

    def describe(self) -> str:
        """The tool section in the wording of Qwen's chat template, which the models know."""
        return (
            f"{signatures(self.specs.values())}\n\n"
            "For each function call, return a json object with function name and arguments within "
            f"{OPEN}{CLOSE} XML tags:\n{OPEN}\n"
            '{"name": <function-name>, "arguments": <args-json-object>}\n'
            f"{CLOSE}"
        )

    def is_told_in(self, text: str) -> bool:
        return OPEN in text and '"arguments"' in text and all(name in text for name in self.specs)


def signatures(specs: Iterable[ToolSpec]) -> str:
    """The tools as Qwen's chat template lists them."""
    tools = "\n".join(json.dumps(function_schema(spec), ensure_ascii=False) for spec in specs)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>\n{tools}\n</tools>"
    )


def _near(text: str, position: int) -> str:
    return repr(text[position : position + 20]) if text[position:] else "its end"
