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
        kind = spec.parameters.get("properties", {}).get(name, {}).get("type")
        if isinstance(value, str) and kind in _READ:
            with suppress(ValueError, KeyError):  # refused below
                made[name] = _READ[kind](value.strip())
    if problem := argument_error(spec.parameters, made):
        raise CallRefused(problem)
    return made
