"""The search tool as an HTTP server: POST /search {"query", "top_k"?}, POST /retrieve, GET /health.

    python -m system.tools.search_server --corpus corpus.jsonl --port 8101 [--index DIRECTORY]

A reply to /search is {"results": [{"id", "title", "text", "score"}, …]}, best first; /health counts the
documents.

/retrieve is Search-R1's protocol, for clients written for it: {"queries", "topk"?, "return_scores"?} is
answered by {"result": [one list per query]} of {"document": {"id", "title", "text", "contents"}, "score"},
or of the documents alone; "contents" is the title in quotation marks, a new line, the text.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import asdict
from typing import Any

from aiohttp import web

from system.serving import json_object, serve_until_signal
from system.tools.search_index import CorpusError, Document, SearchIndex, read_corpus

INDEX = web.AppKey("index", SearchIndex)
DEFAULT_TOP_K, MAX_TOP_K = 3, 100
MAX_QUERIES = 1024


def create_app(index: SearchIndex) -> web.Application:
    app = web.Application()
    app[INDEX] = index
    app.router.add_post("/search", _search)
    app.router.add_post("/retrieve", _retrieve)
    app.router.add_get("/health", _health)
    return app


async def _search(request: web.Request) -> web.Response:
    body = await json_object(request)
    query, top_k = body.get("query"), _top_k(body, "top_k")
    if not isinstance(query, str):
        raise web.HTTPBadRequest(text="'query' must be a string")
    hits = await asyncio.to_thread(request.app[INDEX].search, query, top_k)  # a slow one holds up no other
    return web.json_response({"results": [asdict(hit.document) | {"score": hit.score} for hit in hits]})


async def _retrieve(request: web.Request) -> web.Response:
    body = await json_object(request)
    queries, top_k, scored = body.get("queries"), _top_k(body, "topk"), body.get("return_scores", False)
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise web.HTTPBadRequest(text="'queries' must be a list of strings")
    if len(queries) > MAX_QUERIES:
        raise web.HTTPBadRequest(text=f"'queries' may be at most {MAX_QUERIES}")
    if not isinstance(scored, bool):
        raise web.HTTPBadRequest(text="'return_scores' must be true or false")
    result: list[list[dict[str, Any]]] = []
    for query in queries:
        hits = await asyncio.to_thread(request.app[INDEX].search, query, top_k)
        documents = [_contents(hit.document) for hit in hits]
        scores = [hit.score for hit in hits]
        result.append(
            [{"document": d, "score": s} for d, s in zip(documents, scores, strict=True)]
            if scored
            else documents
        )
    return web.json_response({"result": result})


def _contents(document: Document) -> dict[str, Any]:
    return asdict(document) | {"contents": f'"{document.title}"\n{document.text}'}


def _top_k(body: dict[str, Any], key: str) -> int:
    top_k = body.get(key)
    if top_k is None:
        return DEFAULT_TOP_K
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= MAX_TOP_K:
        raise web.HTTPBadRequest(text=f"'{key}' must be a whole number from 1 to {MAX_TOP_K}")
    return top_k


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
