"""The tools that are served over HTTP, by name."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from aiohttp import web

from system.config import ToolsConfig
from system.serving import serve


@asynccontextmanager
async def served(
    names: Sequence[str], tools: ToolsConfig, corpus: str, keys: Mapping[str, str]
) -> AsyncGenerator[dict[str, str]]:
    """The tools ``names``, served by this process for the length of the block: their URLs.  ``keys``: what
    each wants to be shown.
    """
    async with AsyncExitStack() as stack:
        urls: dict[str, str] = {}
        for name in names:
            server = await serve(application(name, tools, corpus), key=keys[name])
            stack.push_async_callback(server.close)
            urls[name] = server.url
        yield urls


def application(name: str, tools: ToolsConfig, corpus: str) -> web.Application:
    """The server of the tool ``name``, one of ``plugins.SERVED_TOOLS``; ``corpus``: the file that search
    finds in.
    """
    if name == "search":
        from system.tools.search_index import SearchIndex, read_corpus
        from system.tools.search_server import create_app as search_app

        return search_app(SearchIndex.build(read_corpus(corpus)))
    from system.tools.python_server import create_app as python_app
    from system.tools.sandbox.sandbox import Sandbox, SandboxLimits

    limits = SandboxLimits.from_config(tools)
    return python_app(Sandbox(limits, concurrency=tools.concurrency, packages=tools.python_packages))
