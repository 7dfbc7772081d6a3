"""Qwen3-Coder's function calling: names and arguments as tags, values as they are.

::

    <tool_call>
    <function=search>
    <parameter=query>
    birthplace of Alda
    </parameter>
    </function>
    </tool_call>
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

from system.rollout.syntax.base import MalformedCall, ParsedCall
from system.rollout.syntax.hermes import CLOSE, ONE, OPEN, HermesSyntax, signatures

FUNCTION, END = "<function=", "</function>"
FORM = f"{OPEN}\n{FUNCTION}name>\n<parameter=key>\nvalue\n</parameter>\n{END}\n{CLOSE}"
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


class QwenCoderSyntax(HermesSyntax):
    """Generation stops at ``</tool_call>``.  A call may lack the opening ``<tool_call>``, as these models
    leave it out at times.  A value is text where the tool's schema says so, or says nothing, else JSON.
    """

    opens = (OPEN, FUNCTION)
    result_close = "\n</tool_response>\n<|im_end|>\n<|im_start|>assistant\n"

    def parse(self, segment_text: str) -> ParsedCall | MalformedCall | None:
        end = segment_text.rfind(CLOSE)
        if end < 0:
            return None
        content = segment_text[:end].rpartition(OPEN)[2]
        _, found, content = content.partition(FUNCTION)
        if not found or CLOSE in content:
            return MalformedCall(f"{CLOSE} without {FUNCTION}name>: write\n{FORM}")
        if FUNCTION in content:
            return MalformedCall(f"two calls in one: {ONE[self.several]}")
        return self._read(content)

    def _read(self, content: str) -> ParsedCall | MalformedCall:
        """The call after ``<function=``."""
        name, closed, rest = content.partition(">")
        body, ended, after = rest.partition(END)
        if not closed or not ended or after.strip():
            return MalformedCall(f"the call does not end with {END} and {CLOSE}: write\n{FORM}")
        if (name := name.strip()) not in self.specs:
            return self.unknown(name)
        arguments: dict[str, Any] = {}
        place = 0
        while match := _PARAMETER.match(body, place):
            key, place = match[1].strip(), match.end()
            arguments[key] = self._value(name, key, match[2])
        if left := body[place:].strip():
            return MalformedCall(
                f"text where a <parameter=key> was expected, at {left[:20]!r}: write\n{FORM}"
            )
        return ParsedCall(name, arguments)

    def _value(self, tool: str, key: str, text: str) -> Any:
        properties = self.specs[tool].parameters.get("properties", {})
        schema = properties.get(key, {})
        if isinstance(schema, dict) and schema.get("type", "string") != "string":
            with suppress(ValueError, RecursionError):  # the tool's schema then refuses the text
                return json.loads(text)
        return text

    def write(self, call: ParsedCall) -> str:
        texts = (
            (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
            for key, value in call.arguments.items()
        )
        filled = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts)
        return f"{OPEN}\n{FUNCTION}{call.tool}>\n{filled}{END}\n{CLOSE}"

    def describe(self) -> str:
        alone = "" if self.several else ", with nothing after it"
        return f"{signatures(self.specs.values())}\n\nTo call a function, reply in this form{alone}:\n{FORM}"

    def is_told_in(self, text: str) -> bool:
        return FUNCTION in text and all(name in text for name in self.specs)
