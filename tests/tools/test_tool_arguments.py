from __future__ import annotations

from typing import Any

import pytest

from system.tools.tool import argument_error

SCHEMA = {
    "type": "object",
    "properties": {
        "query": {"type": "string"},
        "k": {"type": "integer"},
        "x": {"type": ["number", "null"]},
        "flag": {"type": "boolean"},
        "items": {"type": "array"},
        "unit": {"type": "string", "enum": ["m", "km"]},
        "any": {},
    },
    "required": ["query"],
}


@pytest.mark.parametrize(
    "arguments",
    [
        {"query": "x"},
        {"query": "x", "k": 3, "x": 1.5, "flag": True, "items": [1], "unit": "km", "any": object()},
        {"query": "x", "x": 2},
        {"query": "x", "x": None},
        {"query": "x", "unknown": 1},
    ],
)
def test_good(arguments: dict[str, Any]) -> None:
    assert argument_error(SCHEMA, arguments) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "the argument 'query' is missing"),
        ({"query": 3}, "the argument 'query' must be of type string, not int"),
        ({"query": None}, "the argument 'query' must be of type string, not NoneType"),
        ({"query": "x", "k": True}, "the argument 'k' must be of type integer, not bool"),
        ({"query": "x", "k": 1.5}, "the argument 'k' must be of type integer, not float"),
        ({"query": "x", "x": "1"}, "the argument 'x' must be of type number or null, not str"),
        ({"query": "x", "flag": 1}, "the argument 'flag' must be of type boolean, not int"),
        ({"query": "x", "unit": "mile"}, "the argument 'unit' must be one of m, km"),
    ],
)
def test_bad(arguments: dict[str, Any], message: str) -> None:
    assert argument_error(SCHEMA, arguments) == message


def test_closed_schema() -> None:
    closed = {**SCHEMA, "additionalProperties": False}
    assert argument_error(closed, {"query": "x", "l": 1}).startswith("unknown argument 'l'; known: query, k")
