"""Arguments that were written as texts, read as what a tool wants: between tags there is nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from system.tree.values import odd_number, too_deep

_READ: dict[str, Callable[[str], Any]] = {
    "integer": int,
    "number": float,
    "boolean": lambda text: {"true": True, "false": False}[text.lower()],
    "null": lambda text: {"null": None, "none": None}[text.lower()],
    "array": json.loads,
    "object": json.loads,
}
_KINDS = {bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array", dict: "object"}


def as_wanted(parameters: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``arguments`` with each text read as the number, list, … that the JSON schema ``parameters`` wants
    there.  What it does not spell, and what may be a text, stays as it is.
    """
    properties = parameters.get("properties", {})
    return {
        name: _read(_wanted(properties.get(name)), value) if isinstance(value, str) else value
        for name, value in arguments.items()
    }


def _read(kinds: list[str], text: str) -> Any:
    """``text`` as the first of ``kinds`` that it spells; as it is where that is one of them, or none fits."""
    for kind in kinds if "string" not in kinds else ():
        with suppress(ValueError, KeyError, RecursionError):
            value = _READ[kind](text.strip())
            if not odd_number(value) and not too_deep(value):
                return value
    return text


def _wanted(schema: Any) -> list[str]:
    """The types that a parameter may be of; none: that is not known."""
    if not isinstance(schema, Mapping):  # true and false are schemas, too
        return []
    if (kind := schema.get("type")) is not None:
        kinds = [kind] if isinstance(kind, str) else [*kind]
        return kinds if all(isinstance(one, str) for one in kinds) else []  # of draft 3, one may be a schema
    if "enum" in schema:
        return [_KINDS.get(type(value), "string") for value in schema["enum"]]
    ways = [_wanted(way) for way in schema.get("anyOf", ())]
    return [kind for way in ways for kind in way] if all(ways) else []
