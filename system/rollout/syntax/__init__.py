"""How a model writes a tool call, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from system import plugins
from system.rollout.syntax.base import MalformedCall, ParsedCall, Syntax
from system.tools.outcome import ToolSpec

__all__ = ["MalformedCall", "ParsedCall", "Syntax", "make_syntax"]


def make_syntax(name: str, specs: Mapping[str, ToolSpec], options: Mapping[str, Any] | None = None) -> Syntax:
    """The syntax called ``name`` for the tools in ``specs``.  Raises :class:`plugins.PluginError`."""
    return plugins.SYNTAXES.make(name, options or {}, specs)
