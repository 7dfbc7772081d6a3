"""The tools of MCP servers as tools of ours."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

from system.config.mcp import McpPlace, place
from system.errors import ConfigError
from system.plugins import nearest
from system.tools.mcp.server import McpServer
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec, ToolStatus
from system.tools.tool import ToolUnavailable, schema_problem

if TYPE_CHECKING:
    from mcp.types import CallToolResult, Tool

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")  # what every syntax of calls can hold


class McpTool:
    """One tool of a server that is shared by all branches of a run: it must keep no state between calls that
    one branch should not see of another.
    """

    def __init__(self, server: McpServer, spec: ToolSpec, name: str) -> None:
        """``name``: the server's own for it."""
        self.spec, self._server, self._name = spec, server, name

    async def run(self, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        from mcp import MCPError

        try:
            return outcome(await self._server.call(self._name, dict(arguments)))
        except MCPError as error:  # the server's refusal, for the model to mend
            return ToolOutcome(ToolStatus.ERROR, f"The tool {self.spec.name!r} failed: {error.message}")

    async def check(self) -> None:
        await self._server.check()

    async def close(self) -> None:
        await self._server.close()


def mcp_tools(servers: Sequence[Mapping[str, Any]]) -> list[McpTool]:
    """The tools that ``servers``, entries of ``tools.mcp``, offer: as they say themselves when first asked.

    Starts each once, to ask; connections for calls are opened by the first call.  Raises
    :class:`.ToolUnavailable` for one that does not answer and ConfigError for tools that it does not have, or
    that no call can name.
    """
    made: list[McpTool] = []
    for number, given in enumerate(servers):
        server = McpServer(there := place(f"tools.mcp[{number}]", given))
        made += [McpTool(server, spec, name) for spec, name in listed(there)]
    return made


@cache
def listed(there: McpPlace) -> tuple[tuple[ToolSpec, str], ...]:
    """What a server offers, each with the server's own name for it; asked once per process.  Blocks."""
    with ThreadPoolExecutor(1) as thread:  # there may be an event loop in this one
        try:
            offered = thread.submit(asyncio.run, _ask(there)).result()
        except ToolUnavailable as error:
            raise ToolUnavailable(f"{there.where}: {error}", delivered=error.delivered) from error
    names = [tool.name for tool in offered]
    named = {"names": dict(there.names), "include": there.include, "pure": there.pure}
    for key, those in (named | {"idempotent": there.idempotent}).items():
        for name in those:
            if name not in names:
                raise ConfigError(
                    f"{there.where}.{key}: {there.name} has no tool {name!r}{nearest(name, names)}; "
                    f"it has {', '.join(names) or 'none'}"
                )
    kept = [tool for tool in offered if not there.include or tool.name in there.include]
    made = tuple((_spec(there, tool), tool.name) for tool in kept)
    for name, count in Counter(spec.name for spec, _ in made).items():
        if count > 1:
            of = ", ".join(theirs for spec, theirs in made if spec.name == name)
            raise ConfigError(
                f"{there.where}: {count} tools of {there.name} would be called {name!r} ({of}): give each a "
                f"name of its own with {there.where}.names, or leave one out with {there.where}.include"
            )
    return made


async def _ask(there: McpPlace) -> list[Tool]:
    server = McpServer(there)
    try:
        return await server.tools()
    finally:
        await server.close()


def _spec(there: McpPlace, tool: Tool) -> ToolSpec:
    name = dict(there.names).get(tool.name, there.prefix + tool.name)
    schema = dict(tool.input_schema)
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{there.where}: the tool {name!r} has a name that no call can hold (letters, digits, "
            f"_ and -): give it another with {there.where}.names"
        )
    if problem := schema_problem(schema):
        raise ConfigError(
            f"{there.where}: the tool {tool.name!r} of {there.name} has a schema that cannot be used: "
            f"{problem}: leave the tool out by {there.where}.include, or mend the server"
        )
    known = schema.get("properties", {})
    needed = [key for key in schema.get("required", ()) if key in known]
    return ToolSpec(
        name,
        (tool.description or tool.title or "").strip(),
        {"type": "object"} | schema,
        primary=next(iter([*needed, *known]), ""),
        pure=tool.name in there.pure,
        idempotent=tool.name in there.idempotent,
        patterns=False,
    )


def outcome(result: CallToolResult) -> ToolOutcome:
    """What a model reads of a result: its texts; where there are none, its structured content as JSON."""
    status = ToolStatus.ERROR if result.is_error else ToolStatus.OK
    texts = [_text(block) for block in result.content]
    if not any(texts) and result.structured_content is not None:
        texts = [json.dumps(result.structured_content, sort_keys=True, ensure_ascii=False)]
    return ToolOutcome(status, "\n".join(text for text in texts if text))


def _text(block: Any) -> str:
    if block.type == "text":
        return block.text
    if block.type == "resource" and hasattr(block.resource, "text"):
        return block.resource.text
    if block.type == "resource_link":
        return f"[a resource: {block.uri}]"
    return f"[{'an' if block.type[:1] in 'aeiou' else 'a'} {block.type}, which cannot be shown here]"
