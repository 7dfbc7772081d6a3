"""A stub engine server for load tests: streams prepared tokens over HTTP at a given pace, as SGLang would.

It speaks the part of the protocol that generation needs and computes nothing: messages are encoded once, at
start, and a chunk costs one ``write``, so one process outpaces any client.  Which of its segments a request
gets follows from the request's sampling seed.

Run as ``python -m system.bench.stub_engine`` with a :class:`Script` as JSON on standard input; it prints its
address.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

from system.serving import serve_until_signal


@dataclass(frozen=True)
class Script:
    """What the stub says, and how fast."""

    segments: list[list[int]]  # token ids; the last ends the segment
    texts: list[list[str]]  # the text of each token
    matched: list[str]  # the stop string that each segment ends with; "": end of sequence
    chunk_tokens: int
    tokens_per_s: float  # of each stream
    first_s: float  # seconds until the first chunk


def application(plan: Script) -> web.Application:
    """The stub engine.  Every path but /generate answers with an empty object."""
    messages = [_encoded(plan, number) for number in range(len(plan.segments))]

    async def generate(request: web.Request) -> web.StreamResponse:
        seed = orjson.loads(await request.read())["sampling_params"]["sampling_seed"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        loop = asyncio.get_running_loop()
        due = loop.time() + plan.first_s
        for message in messages[seed % len(messages)]:
            await asyncio.sleep(due - loop.time())
            await response.write(message)
            due += plan.chunk_tokens / plan.tokens_per_s  # the pace holds on average, however late this was
        return response

    async def anything_else(_: web.Request) -> web.Response:
        return web.json_response({})

    app = web.Application()
    app.router.add_post("/generate", generate)
    app.router.add_route("*", "/{path:.*}", anything_else)
    return app


def _encoded(plan: Script, number: int) -> list[bytes]:
    """Segment ``number`` as messages ready to send, one per chunk."""
    tokens, texts, size = plan.segments[number], plan.texts[number], plan.chunk_tokens
    wire: list[bytes] = []
    for begin in range(0, len(tokens), size):
        end = min(begin + size, len(tokens))
        part = tokens[begin:end]
        finish = {"type": "stop", "matched": plan.matched[number] or part[-1]}
        meta: dict[str, Any] = {
            "id": "stub",
            "finish_reason": finish if end == len(tokens) else None,
            "prompt_tokens": 64,
            "completion_tokens": end,
            "cached_tokens": 0,
            "weight_version": "1",
            "weight_versions": [{"version": "1", "start": 0, "end": end}],
            "output_token_logprobs": [[-1.2345678 - 0.01 * i, t, None] for i, t in enumerate(part)],
            "entropy": [1.0 + 0.1 * ((number + begin + i) % 7) for i in range(len(part))],
        }
        message = {"text": "".join(texts[begin:end]), "output_ids": part, "meta_info": meta}
        wire.append(b"data: " + orjson.dumps(message) + b"\n\n")
    wire[-1] += b"data: [DONE]\n\n"
    return wire


if __name__ == "__main__":
    script = Script(**orjson.loads(sys.stdin.buffer.read()))
    asyncio.run(serve_until_signal(application(script), "127.0.0.1", 0))
