"""How a model writes a tool call, as plug-ins by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from system.rollout.syntax.base import MalformedCall, ParsedCall, Syntax
from system.rollout.syntax.hermes import HermesSyntax
from system.rollout.syntax.tags import TagSyntax
from system.tools.outcome import ToolSpec

SYNTAXES: dict[str, Callable[[Mapping[str, ToolSpec]], Syntax]] = {
    "tags": TagSyntax,
    "hermes": HermesSyntax,
}

__all__ = ["SYNTAXES", "HermesSyntax", "MalformedCall", "ParsedCall", "Syntax", "TagSyntax", "make_syntax"]


def make_syntax(name: str, specs: Mapping[str, ToolSpec]) -> Syntax:
    """The syntax called ``name`` for the tools in ``specs``; raises ``ValueError`` for an unknown name."""
    if name not in SYNTAXES:
        raise ValueError(f"unknown tool-call syntax {name!r}: choose one of {', '.join(SYNTAXES)}")
    return SYNTAXES[name](specs)
