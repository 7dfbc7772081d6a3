from __future__ import annotations

from typing import Any

import pytest

from system.tools.tool import argument_error, schema_problem

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


SLOW = "(a+)+$"  # takes for ever to find that it does not match
BELOW_ONE = {"minimum": 0, "exclusiveMinimum": True}


@pytest.mark.timeout(20)
def test_a_servers_regular_expressions_are_left_to_the_server() -> None:
    text = "a" * 60 + "!"
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": SLOW}}}
    assert argument_error(schema, {"a": text}, patterns=False) == ""
    assert argument_error(schema, {"a": 1}, patterns=False) == "a: 1 is not of type 'string'"
    assert argument_error(schema, {"a": "b"}) == f"a: 'b' does not match '{SLOW}'"
    for more in ({"additionalProperties": False}, {"unevaluatedProperties": False}):
        named = {"type": "object", "patternProperties": {SLOW: {"type": "string"}}, **more}
        assert argument_error(named, {text: "x"}, patterns=False) == ""
    closed = {**schema, "additionalProperties": False}
    assert "'b' was unexpected" in argument_error(closed, {"b": 1}, patterns=False)


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ("http://json-schema.org/draft-04/schema#", "a: 0 is less than or equal to the minimum of 0"),
        ("https://json-schema.org/draft/2020-12/schema", ""),  # where true is the number 1
    ],
)
def test_a_schema_is_of_the_draft_that_it_names(draft: str, message: str) -> None:
    properties = {"a": BELOW_ONE | ({} if message else {"exclusiveMinimum": -1})}
    assert argument_error({"$schema": draft, "properties": properties}, {"a": 0}) == message


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "object"}, ""),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "properties": {"a": BELOW_ONE}}, ""),
        ({"properties": {"a": BELOW_ONE}}, "properties: a: exclusiveMinimum: True is not of type 'number'"),
        ({"$schema": "https://example.org/own", "type": "object"}, ""),
        ({"$schema": ["x"]}, "$schema: ['x'] is not of type 'string'"),
        ({"type": "objct"}, "type: 'objct' is not valid under any of the given schemas"),
        ({"properties": {"a": {"pattern": "("}}}, "properties: a: pattern: '(' is not a 'regex'"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {}}}, ""),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}}, "it refers to '/$defs/a', which it does not have"),
        (
            {"properties": {"a": {"$ref": "http://127.0.0.1:1/a"}}},  # nobody is asked for it
            "it refers to 'http://127.0.0.1:1/a', which it does not have",
        ),
    ],
)
def test_what_is_wrong_with_a_schema(schema: dict[str, Any], problem: str) -> None:
    assert schema_problem(schema) == problem


def test_a_schema_that_cannot_be_followed_refuses_the_call() -> None:
    assert argument_error({"$ref": "#"}, {}) == "the arguments are nested too deeply"
    assert "refers to '/a'" in argument_error({"$ref": "#/a"}, {})
