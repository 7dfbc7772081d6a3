"""Schemas of MCP servers: read by their own draft, told where they are wrong, and never in the way."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from system.config import ToolsConfig
from system.tools.outcome import CallContext, ToolOutcome, ToolStatus
from system.tools.service import ToolService, ToolStartError, build_tools

SERVER = Path(__file__).parent / "odd_mcp_server.py"
SLOW = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(a+)+$"}}}
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
