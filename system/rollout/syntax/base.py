"""What every tool-call syntax says: where generation stops, what was called, how a result looks."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from system.plugins import PluginError, nearest
from system.tools.outcome import ToolSpec
from system.tree.values import MOST_DEPTH, odd_number, too_deep

_THOUGHT_ENDS = "</think>"


@dataclass(frozen=True, slots=True)
class ParsedCall:
    tool: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class MalformedCall:
    """The model meant a call but wrote none that can be made; it reads ``reason`` as the result."""

    reason: str


class Syntax(ABC):
    """One way of writing tool calls, for the tools in ``specs``.

    With ``rollout.calls_per_turn=one`` generation stops at the first one that is complete.
    """

    stops: tuple[str, ...]  # stop strings: each one completes a call
    opens: tuple[str, ...]  # what a call may begin with
    result_open: str  # what stands before a tool's answer ...
    result_close: str  # ... and after it
    several = False  # whether a turn may make several calls (:meth:`calls`), each in tags of its own
    new_turn = False  # whether that ends with a new turn of the model, as the chat template opens one
    # The same around what a user says after the model's turn has ended.
    message_open = "\n<user>\n"
    message_close = "\n</user>\n"
    # A result within a text that holds several turns, as data have it: what opens and closes it (regular
    # expressions), white space of the tags included.
    in_text = (r"\s*<result>\n?", r"\n?</result>")

    def __init__(self, specs: Mapping[str, ToolSpec]) -> None:
        self.specs = dict(specs)

    @abstractmethod
    def parse(self, segment_text: str) -> ParsedCall | MalformedCall | None:
        """The call that a stopped model segment ends with; None when it holds no closing tag.

        What follows the last closing tag is the rest of the token that completed it (a tokenizer may merge
        ``>`` with what comes next) and is ignored. ``segment_text`` is what the model wrote since the
        prompt or the last tool result, nothing older: a stray closing tag cannot find its opener in the
        prompt or in a tool's answer.
        """

    def calls(self, turn_text: str) -> list[ParsedCall | MalformedCall]:
        """All calls of a whole turn in the order in which they are written, each up to its closing tag; what
        the model thought aloud before (up to the last ``</think>``) makes none.
        """
        said = turn_text.rpartition(_THOUGHT_ENDS)[2]
        ends = sorted(match.end() for stop in self.stops for match in re.finditer(re.escape(stop), said))
        pieces = [said[begin:end] for begin, end in pairwise([0, *ends])]
        return [call for piece in pieces if (call := self.parse(piece)) is not None]

    def render_result(self, text: str) -> str:
        """A tool's answer as the model reads it."""
        return f"{self.result_open}{text}{self.result_close}"

    def write(self, call: ParsedCall) -> str:
        """The call as the model writes it, which :meth:`parse` reads: for calls that data hold as fields.

        Raises :class:`PluginError` for one that cannot be written so.
        """
        raise PluginError(
            f"{type(self).__name__} has no write(call): give it one, or write the calls into the contents"
        )

    @abstractmethod
    def describe(self) -> str:
        """Instructions that tell a model the tools and the syntax."""

    @abstractmethod
    def is_told_in(self, text: str) -> bool:
        """Whether ``text`` tells of all the tools and of this syntax already."""

    def unknown(self, tool: str) -> MalformedCall:
        """The answer to a call of a tool that there is not."""
        names = ", ".join(self.specs)
        return MalformedCall(f"unknown tool {tool[:40]!r}; tools: {names}{nearest(tool[:40], self.specs)}")


def bounded(call: ParsedCall | MalformedCall) -> ParsedCall | MalformedCall:
    """``call``, unless what it holds is nested too deeply to be copied, checked and kept, or is a number by
    which no tool and no world can calculate.
    """
    if isinstance(call, ParsedCall) and too_deep(call.arguments):
        return MalformedCall(f"the arguments are nested more than {MOST_DEPTH} deep")
    if isinstance(call, ParsedCall) and odd_number(call.arguments):
        return MalformedCall("a number in the arguments is not finite, or too large")
    return call


def function_schema(spec: ToolSpec) -> dict[str, Any]:
    """A tool as chat templates, and models, know tools."""
    function = {"name": spec.name, "description": spec.description, "parameters": spec.parameters}
    return {"type": "function", "function": function}
