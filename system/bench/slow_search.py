"""The search server with a latency of one's choice, for runs that shall show how a system bears slow tools.

    python -m system.bench.slow_search --corpus corpus.jsonl --port 8101 --mean-s 1 --sigma 1

``espalier train … tools.search_url=http://127.0.0.1:8101`` uses it.  Latencies are lognormal around the
mean, drawn from a seed in the order of the calls.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from collections.abc import Callable

import numpy as np
from aiohttp import web
from aiohttp.typedefs import Handler

from system.serving import serve_until_signal
from system.tools.search_index import SearchIndex, read_corpus
from system.tools.search_server import create_app
from system.twin.dist import Lognormal


def slowed(app: web.Application, seconds: Callable[[bytes], float]) -> web.Application:
    """``app`` with every search held up for ``seconds`` of its body; its health check answers at once."""

    @web.middleware
    async def wait(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path == "/search":
            await asyncio.sleep(seconds(await request.read()))
        return await handler(request)

    app.middlewares.append(wait)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve BM25 search, slowly.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--corpus", required=True, help='JSONL of {"id", "title", "text"}')
    parser.add_argument("--mean-s", type=float, default=1.0)
    parser.add_argument("--sigma", type=float, default=0.0, help="of ln(seconds)")
    parser.add_argument(
        "--stragglers", type=float, default=0.0, help="share of calls that take 30 times as long"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    latency = Lognormal(args.mean_s, args.sigma, args.stragglers)
    draws = itertools.count(args.seed * 1_000_003 + 1)
    app = create_app(SearchIndex.build(read_corpus(args.corpus)))
    slowed(app, lambda _: latency.draw(np.random.default_rng(next(draws))))
    asyncio.run(serve_until_signal(app, args.host, args.port))


if __name__ == "__main__":
    main()
