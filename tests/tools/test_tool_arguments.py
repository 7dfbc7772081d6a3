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
        ({}, "'query' is a required property"),
        ({"query": 3}, "query: 3 is not of type 'string'"),
        ({"query": None}, "query: None is not of type 'string'"),
        ({"query": "x", "k": True}, "k: True is not of type 'integer'"),
        ({"query": "x", "k": 1.5}, "k: 1.5 is not of type 'integer'"),
        ({"query": "x", "x": "1"}, "x: '1' is not of type 'number', 'null'"),
        ({"query": "x", "flag": 1}, "flag: 1 is not of type 'boolean'"),
        ({"query": "x", "unit": "mile"}, "unit: 'mile' is not one of ['m', 'km']"),
    ],
)
def test_bad(arguments: dict[str, Any], message: str) -> None:
    assert argument_error(SCHEMA, arguments) == message


def test_closed_schema() -> None:
    closed = {**SCHEMA, "additionalProperties": False}
    message = argument_error(closed, {"query": "x", "l": 1})
    assert message.startswith("Additional properties are not allowed ('l' was unexpected); known: query, k")
