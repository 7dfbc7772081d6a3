"""A judge that takes its time and sometimes fails, for runs that shall show how a system bears one.

    python -m system.bench.slow_judge --port 8102 --seconds 1 --failures 0.01

``espalier train … 'reward.options={base_url: "http://127.0.0.1:8102/v1", model: any}' reward=judge`` uses it.
An answer is correct if it is the reference word for word, as the built-in template shows both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re

from aiohttp import web

from system.serving import json_object, serve_until_signal

_SHOWN = re.compile(r"<(gold|answer)-[0-9a-f]{16}>(.*?)</\1-[0-9a-f]{16}>", re.S)


def create_app(seconds: float, failures: float, seed: int = 0) -> web.Application:
    """Answers after so many ``seconds``; the share ``failures`` of requests with HTTP 500."""
    rng = random.Random(seed)

    async def complete(request: web.Request) -> web.Response:
        asked = (await json_object(request))["messages"][-1]["content"]
        fails = rng.random() < failures
        await asyncio.sleep(seconds)
        if fails:
            raise web.HTTPInternalServerError(text="out of luck")
        shown = dict(_SHOWN.findall(asked))
        right = shown.get("answer", "").split() == shown.get("gold", "").split()
        content = json.dumps({"reason": "word for word", "correctness": int(right)})
        usage = {"prompt_tokens": len(asked) // 4, "completion_tokens": len(content) // 4}
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "usage": usage})

    app = web.Application(client_max_size=16 << 20)
    app.router.add_post("/v1/chat/completions", complete)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a judge, slowly.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=1.0, help="before each answer")
    parser.add_argument("--failures", type=float, default=0.01, help="share of requests that fail")
    args = parser.parse_args()
    asyncio.run(serve_until_signal(create_app(args.seconds, args.failures), args.host, args.port))


if __name__ == "__main__":
    main()
