"""Schemas of MCP servers: read by their own draft, told where they are wrong, and never in the way."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from system.config import ToolsConfig
from system.envs.mcp import McpEnvironment
from system.errors import ConfigError
from system.tools.outcome import CallContext, ToolOutcome, ToolStatus
from system.tools.service import ToolService, ToolStartError, build_tools
from system.tools.tool import argument_error, schema_problem

SERVER = Path(__file__).parent / "odd_mcp_server.py"
SLOW = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(a+)+$"}}}
DRAFT_7 = "http://json-schema.org/draft-07/schema#"
OLD = {
    "$schema": "http://json-schema.org/draft-04/schema#",
    "type": "object",
    "properties": {"n": {"type": "number", "minimum": 0, "exclusiveMinimum": True}},
}


def service(**schemas: dict[str, Any]) -> ToolService:
    tools = [
        {"name": name, "description": name, "inputSchema": schema, "outputSchema": schema}
        for name, schema in schemas.items()
    ]
    server = {"command": [sys.executable, str(SERVER), json.dumps(tools)]}
    return build_tools(ToolsConfig(names=[], mcp=[server]), {})


@pytest.mark.timeout(60)
async def test_a_servers_regular_expressions_do_not_hold_the_event_loop() -> None:
    """Neither those for what it is asked nor those for what it answers."""
    tools = service(slow=SLOW)
    text = "a" * 60 + "!"
    began = time.monotonic()
    try:
        outcome = await tools.call("slow", {"a": text}, CallContext())
        assert (outcome.status, outcome.text) == (ToolStatus.OK, json.dumps({"a": text}))
        assert (await tools.call("slow", {"a": 1}, CallContext())).status is ToolStatus.REJECTED
    finally:
        await tools.close()
    assert time.monotonic() - began < 30


@pytest.mark.timeout(30)
@pytest.mark.parametrize("draft", [DRAFT_7, "https://json-schema.org/draft/2020-12/schema"])
@pytest.mark.parametrize(
    "within", [{"$ref": "#"}, {"anyOf": [{"$ref": "#"}]}, {"not": {"not": {"$ref": "#"}}}]
)
def test_regular_expressions_stay_off_where_a_subschema_names_its_draft(
    draft: str, within: dict[str, Any]
) -> None:
    """The whole does, where it refers to itself."""
    text = "a" * 60 + "!"
    schema = {
        "$schema": draft,
        "type": "object",
        "properties": {
            "child": within,
            "name": {"type": "string", "pattern": "^(a+)+$"},
            "n": {"minimum": 0},
        },
        "patternProperties": {"^(b+)+$": {"type": "string"}},
        "additionalProperties": False,
    }
    assert schema_problem(schema) == ""
    for child in ({"name": text}, {text.replace("a", "b"): "x"}):
        assert argument_error(schema, {"child": child}, patterns=False) == ""
    assert argument_error(schema, {"child": {"n": -1}}, patterns=False)  # all else is still checked


@pytest.mark.timeout(30)
async def test_a_schema_that_refers_to_itself_does_not_hold_the_event_loop() -> None:
    schema = {"$schema": DRAFT_7, **SLOW, "properties": {**SLOW["properties"], "child": {"$ref": "#"}}}
    tools = service(slow=schema)
    try:
        outcome = await tools.call("slow", {"child": {"a": "a" * 60 + "!"}}, CallContext())
        assert outcome.status is ToolStatus.OK
        assert (await tools.call("slow", {"child": {"a": 1}}, CallContext())).status is ToolStatus.REJECTED
    finally:
        await tools.close()


async def test_a_schema_is_read_by_the_draft_that_it_names() -> None:
    tools = service(old=OLD)

    async def ask(n: float) -> ToolOutcome:
        return await tools.call("old", {"n": n}, CallContext())

    try:
        assert (await ask(1)).status is ToolStatus.OK
        refused = await ask(0)
        assert (refused.status, refused.text) == (
            ToolStatus.REJECTED,
            "old: n: 0 is less than or equal to the minimum of 0.",
        )
    finally:
        await tools.close()


def test_a_schema_that_cannot_be_used_is_told_at_the_start() -> None:
    for schema, says in (
        ({"type": "object", "properties": {"a": {"type": "txt"}}}, "properties: a: type: 'txt' is not valid"),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}}, "it refers to '/$defs/a', which it"),
    ):
        with pytest.raises(ToolStartError) as told:
            service(fine={"type": "object"}, odd=schema)
        for word in (
            "tools.mcp[0]: the tool 'odd' of",
            "odd_mcp_server.py",
            says,
            "leave the tool out by tools.mcp[0].include",
        ):
            assert word in str(told.value)


@pytest.mark.parametrize(
    "properties",
    [
        {"a": {"$id": "item", "$ref": "#/$defs/x", "$defs": {"x": {"type": "integer"}}}},
        {"a": {"$ref": "item"}, "b": {"$id": "item", "type": "integer"}},
        {"a": {"type": "integer"}, "b": {"default": {"$ref": "#/none"}, "examples": [{"$ref": "#/none"}]}},
        {"a": {"type": "integer"}, "b": {"const": {"$ref": "none"}}, "c": {"enum": [{"$ref": "none"}]}},
        {"a": {"type": "integer"}, "$ref": {"type": "string"}},
    ],
)
def test_references_are_followed_from_where_they_stand_and_those_in_data_are_none(
    properties: dict[str, Any],
) -> None:
    schema = {"type": "object", "properties": properties}
    assert schema_problem(schema) == ""
    assert argument_error(schema, {"a": 1}, patterns=False) == ""
    assert argument_error(schema, {"a": "x"}, patterns=False) == "a: 'x' is not of type 'integer'"


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"$id": 5}, "$id: 5 is not of type 'string'"),
        ({"properties": {"a": {"$id": 5}}}, "properties: a: $id: 5 is not of type 'string'"),
        ({"$id": "http://["}, "it cannot be followed: ValueError: Invalid IPv6 URL"),
        ({"$ref": "#/required/x", "required": ["x"]}, "it cannot be followed: ValueError: invalid literal"),
        ({"$schema": OLD["$schema"], "items": {"$ref": 5}}, "it cannot be followed: AttributeError: 'int'"),
        ({"allOf": [{"$id": "item", "not": {"$ref": "#/x"}}]}, "it refers to '/x', which it does not have"),
    ],
)
def test_a_schema_with_odd_values_is_told_and_not_run_into(schema: dict[str, Any], problem: str) -> None:
    assert schema_problem({"type": "object", **schema}).startswith(problem)


def test_a_reference_to_what_is_no_schema_refuses_the_call() -> None:
    """It is found by the call alone: only there is it known to be read as a schema."""
    schema = {"$ref": "#/title", "title": "x"}
    assert schema_problem(schema) == ""
    told = argument_error(schema, {}, patterns=False)
    assert told.startswith("the tool's schema cannot be followed: AttributeError: ")
    with pytest.raises(AttributeError):  # in a tool of one's own it is a fault to mend
        argument_error(schema, {})


HIDDEN = {"type": "string", "pattern": "^\\."}  # whether it matches, only the server finds out
DRAFT_3 = "http://json-schema.org/draft-03/schema#"


@pytest.mark.parametrize(
    ("schema", "given"),
    [
        ({"not": HIDDEN}, "a"),
        ({"not": {"anyOf": [{"type": "null"}, {"not": {"not": HIDDEN}}]}}, "a"),
        ({"not": {"patternProperties": {"^b": {"type": "string"}}}}, {"b": 1}),
        ({"not": {"propertyNames": {"pattern": "^b"}}}, {"a": 1}),
        ({"not": {"unevaluatedProperties": False}}, {"a": 1}),
        ({"oneOf": [HIDDEN, {"type": "string"}]}, "a"),
        ({"if": HIDDEN, "then": {"minLength": 9}}, "a"),
        ({"if": HIDDEN, "then": {"minLength": 9}, "else": {"minLength": 1}}, "a"),
        ({"contains": HIDDEN, "maxContains": 1}, ["a", ".b", "c"]),
        (
            {
                "if": {"not": {"not": {"items": HIDDEN}}},
                "else": {"prefixItems": [True]},
                "unevaluatedItems": False,
            },
            ["a"],
        ),
        ({"properties": {"b": {"not": {"$ref": "#/$defs/hidden"}}}, "$defs": {"hidden": HIDDEN}}, {"b": "a"}),
    ],
)
def test_what_hangs_on_a_skipped_regular_expression_refuses_nothing(
    schema: dict[str, Any], given: Any
) -> None:
    whole = {"type": "object", "properties": {"a": schema}} | {"$defs": schema.get("$defs", {})}
    assert schema_problem(whole) == ""
    assert argument_error(whole, {"a": given}) == "", "the call is valid"
    assert argument_error(whole, {"a": given}, patterns=False) == ""


def test_what_the_third_draft_disallows_by_a_regular_expression_is_not_refused() -> None:
    schema = {"$schema": DRAFT_3, "properties": {"a": {"disallow": [HIDDEN, "null"]}}}
    assert argument_error(schema, {"a": "b"}, patterns=False) == ""
    schema["properties"]["a"]["disallow"] = ["null"]
    assert argument_error(schema, {"a": None}, patterns=False) == "a: 'null' is disallowed for None"


@pytest.mark.parametrize(
    ("schema", "given"),
    [
        ({"not": {"type": "integer"}}, 1),
        ({"not": HIDDEN | {"type": "integer"}}, 1),  # it is no text, so no pattern is asked
        ({"oneOf": [HIDDEN, {"type": "null"}]}, 1),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "a"),
        ({"if": {"type": "string"}, "then": {"minLength": 9}}, "a"),
        ({"if": {"type": "string"}, "else": {"minimum": 9}}, 1),
        ({"if": HIDDEN, "then": {"minLength": 9}, "else": {"minLength": 8}}, "a"),
        ({"contains": HIDDEN}, [1]),
        ({"contains": {"type": "string"}, "maxContains": 1}, ["a", "b"]),
        ({"prefixItems": [True], "unevaluatedItems": False}, [1, 2]),
        ({"allOf": [{"not": HIDDEN}, {"minLength": 3}]}, "a"),
    ],
)
def test_what_is_wrong_however_the_expression_goes_is_refused_here(
    schema: dict[str, Any], given: Any
) -> None:
    whole = {"type": "object", "properties": {"a": schema}}
    assert argument_error(whole, {"a": given})
    assert argument_error(whole, {"a": given}, patterns=False)


def test_two_tools_of_one_name_are_told_at_the_start() -> None:
    """Also where no service of tools would find out: of a server for each branch."""
    tools = [{"name": name, "description": "", "inputSchema": {"type": "object"}} for name in ("a", "b", "c")]
    server = {
        "command": [sys.executable, str(SERVER), json.dumps(tools)],
        "names": {"a": "look", "b": "look"},
    }
    with pytest.raises(
        ConfigError, match=r"2 tools of .* would be called 'look' \(a, b\): give each .*names"
    ):
        McpEnvironment(server)
    offered = McpEnvironment({**server, "include": ["a", "c"]}).tools
    assert [*offered] == ["look", "c"]
