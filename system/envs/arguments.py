"""The arguments of a call as the world gets them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from system.tools.outcome import ToolSpec
from system.tools.service import cleaned
from system.tools.tool import CallRefused, argument_error

_READ: dict[str, Callable[[str], Any]] = {
    "integer": int,
    "number": float,
    "boolean": lambda text: {"true": True, "false": False}[text.lower()],
}


def typed(spec: ToolSpec, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``arguments`` with texts read as the numbers that are wanted: some call syntaxes know only texts.

    Raises :class:`CallRefused` for arguments that the tool does not take.
    """
    made: dict[str, Any] = cleaned(arguments)
    for name, value in made.items():
        schema = spec.parameters.get("properties", {}).get(name)
        kind = schema.get("type") if isinstance(schema, Mapping) else None  # true and false are schemas, too
        if isinstance(value, str) and isinstance(kind, str) and kind in _READ:
            with suppress(ValueError, KeyError):  # refused below
                made[name] = _READ[kind](value.strip())
    if problem := argument_error(spec.parameters, made, spec.patterns):
        raise CallRefused(problem)
    return made
