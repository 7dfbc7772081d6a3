"""Hermes function calling, as Qwen2.5 and Qwen3 were trained on.

A call is ``<tool_call>{"name": …, "arguments": {…}}</tool_call>`` in a ChatML turn; the answer comes back as
``<tool_response>`` in a user turn.
"""

from __future__ import annotations

import json

from system.rollout.syntax.base import MalformedCall, ParsedCall, Syntax

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesSyntax(Syntax):
    """Generation stops at ``</tool_call>``.  The end of the model's turn and the opening of its next one are
    inserted with the result, so the model makes one call at a time."""

    stops = (CLOSE,)
    result_open = "<|im_end|>\n<|im_start|>user\n<tool_response>\n"
    result_close = "\n</tool_response><|im_end|>\n<|im_start|>assistant\n"

    def parse(self, segment_text: str) -> ParsedCall | MalformedCall | None:
        end = segment_text.rfind(CLOSE)
        if end < 0:
            return None
        _, found, content = segment_text[:end].rpartition(OPEN)
        if not found or CLOSE in content:
            return MalformedCall(f"{CLOSE} without {OPEN}")
        try:
            call = json.loads(content)
        except (ValueError, RecursionError):  # too deep a nesting is the model's mistake as well
            return MalformedCall("the tool call is not valid JSON")
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return MalformedCall('a tool call is {"name": <tool>, "arguments": {...}}')
        if call["name"] not in self.specs:
            return MalformedCall(f"unknown tool {call['name'][:40]!r}; tools: {', '.join(self.specs)}")
        arguments = call.get("arguments", {})
        if not isinstance(arguments, dict):
            return MalformedCall("arguments must be a JSON object")
        return ParsedCall(call["name"], arguments)

    def system_prompt(self) -> str:
        """The tool section in the wording of Qwen's chat template, which the models know."""
        signatures = "\n".join(
            json.dumps(
                {
                    "type": "function",
                    "function": {
                        "name": spec.name,
                        "description": spec.description,
                        "parameters": spec.parameters,
                    },
                }
            )
            for spec in self.specs.values()
        )
        return (
            "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n"
            f"<tools>\n{signatures}\n</tools>\n\n"
            "For each function call, return a json object with function name and arguments within "
            f"{OPEN}{CLOSE} XML tags:\n{OPEN}\n"
            '{"name": <function-name>, "arguments": <args-json-object>}\n'
            f"{CLOSE}\n\n"
            "Reason between <think> and </think>. When you know the answer, write it as "
            "<answer> \\boxed{...} </answer>."
        )
