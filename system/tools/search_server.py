"""The search tool as an HTTP server: POST /search {"query", "top_k"?}, GET /health.

    python -m system.tools.search_server --corpus corpus.jsonl --port 8101 [--index DIRECTORY]

A reply to /search is {"results": [{"id", "title", "text", "score"}, …]}, best first; /health counts the
documents.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import asdict

from aiohttp import web

from system.serving import json_object, serve_until_signal
from system.tools.search_index import CorpusError, SearchIndex, read_corpus

INDEX = web.AppKey("index", SearchIndex)
DEFAULT_TOP_K, MAX_TOP_K = 3, 100


def create_app(index: SearchIndex) -> web.Application:
    app = web.Application()
    app[INDEX] = index
    app.router.add_post("/search", _search)
    app.router.add_get("/health", _health)
    return app


async def _search(request: web.Request) -> web.Response:
    body = await json_object(request)
    query, top_k = body.get("query"), body.get("top_k", DEFAULT_TOP_K)
    if not isinstance(query, str):
        raise web.HTTPBadRequest(text="'query' must be a string")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= MAX_TOP_K:
        raise web.HTTPBadRequest(text=f"'top_k' must be a whole number from 1 to {MAX_TOP_K}")
    hits = await asyncio.to_thread(request.app[INDEX].search, query, top_k)  # a slow one holds up no other
    return web.json_response({"results": [asdict(hit.document) | {"score": hit.score} for hit in hits]})


async def _health(request: web.Request) -> web.Response:
    return web.json_response({"ok": True, "tool": "search", "documents": len(request.app[INDEX].documents)})


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve BM25 search over a JSONL corpus, over HTTP.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--corpus", required=True, help='JSONL of {"id", "title", "text"}')
    parser.add_argument("--index", help="directory to keep the index in, so that it is built once")
    args = parser.parse_args()
    try:
        documents = read_corpus(args.corpus)
        index = SearchIndex.cached(documents, args.index) if args.index else SearchIndex.build(documents)
    except CorpusError as error:
        raise SystemExit(f"search_server: {error}") from error
    asyncio.run(serve_until_signal(create_app(index), args.host, args.port))


if __name__ == "__main__":
    main()
