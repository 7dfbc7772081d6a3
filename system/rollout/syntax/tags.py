"""ARPO's tags: ``<think> … </think> <search> query </search>``, results between ``<result>`` and
``</result>``, the answer as ``<answer> … \\boxed{…} </answer>``.

A tool's tag is its name; what stands inside fills the tool's primary argument.  One without arguments has
nothing inside: ``<look></look>``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from system.plugins import PluginError
from system.rollout.syntax.base import MalformedCall, ParsedCall, Syntax
from system.tools.outcome import ToolSpec

TAGS = {"think", "answer", "result"}  # that are no tools


class TagSyntax(Syntax):
    result_open = " <result>\n"
    result_close = "\n</result>"

    def __init__(self, specs: Mapping[str, ToolSpec]) -> None:
        super().__init__(specs)
        if taken := TAGS & specs.keys():
            raise PluginError(
                f"tools.names: a tool cannot be called {min(taken)!r} where calls are written as tags: this "
                "one has a meaning of its own; rename the tool, or take rollout.syntax=hermes"
            )
        for spec in specs.values():
            _holds_one(spec)
        self.stops = tuple(f"</{name}>" for name in self.specs)
        self.opens = tuple(f"<{name}>" for name in self.specs)

    def parse(self, segment_text: str) -> ParsedCall | MalformedCall | None:
        end, name = max(((segment_text.rfind(f"</{name}>"), name) for name in self.specs), default=(-1, ""))
        if end < 0:
            return None
        opener, closer = f"<{name}>", f"</{name}>"
        _, found, content = segment_text[:end].rpartition(opener)
        if not found or closer in content:  # the newest opener is already closed, or there is none
            return MalformedCall(f"{closer} without {opener}")
        content = _content(content)
        primary = self.specs[name].primary
        if content and not primary:
            return MalformedCall(f"{opener} takes nothing: write {opener}{closer}")
        if not content:
            return MalformedCall(f"{opener} is empty") if primary else ParsedCall(name, {})
        return ParsedCall(name, {primary: content})

    def write(self, call: ParsedCall) -> str:
        spec = self.specs.get(call.tool)
        key = spec.primary if spec else next(iter(call.arguments), "")
        if call.arguments.keys() != ({key} if key else set()):
            raise PluginError(f"a tag holds one argument, the call of {call.tool!r} has {[*call.arguments]}")
        inside = f" {call.arguments[key]} " if key else ""
        return f"<{call.tool}>{inside}</{call.tool}>"

    def describe(self) -> str:
        tools = "\n".join(
            f"- {spec.name}: {spec.description} Call it as <{spec.name}>{inside}</{spec.name}>."
            for spec in self.specs.values()
            for inside in (f" {spec.primary} " if spec.primary else "",)
        )
        return (
            f"You may call these tools:\n{tools}\n"
            "A tool's answer appears between <result> and </result>; then go on."
        )

    def is_told_in(self, text: str) -> bool:
        return all(f"<{name}>" in text for name in self.specs)


def _holds_one(spec: ToolSpec) -> None:
    """Raises PluginError for a tool that needs more than the one text that stands between its tags."""
    if more := [key for key in spec.parameters.get("required", ()) if key != spec.primary]:
        needed = ", ".join([spec.primary, *more])
        raise PluginError(
            f"the tool {spec.name!r} needs more than one argument ({needed}), and a tag holds one: take "
            "rollout.syntax=hermes, or leave the tool out"
        )


def _content(raw: str) -> str:
    """What was written between the tags, without the white space that belongs to the tags.

    Code that begins on the opener's own line keeps the indentation of its further lines; code that begins
    below it is dedented as a block.
    """
    first, newline, rest = raw.partition("\n")
    return (first.lstrip() + newline + rest if first.strip() else textwrap.dedent(rest)).strip("\n").rstrip()
