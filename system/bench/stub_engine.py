"""A stub engine server for load tests: streams prepared tokens over HTTP at a given pace, as SGLang would.

It speaks the part of the protocol that generation needs and computes nothing: messages are encoded once, at
start, and a chunk costs one ``write``, so one process outpaces any client.  Which of its segments a request
gets follows from the request's sampling seed.

Run as ``python -m system.bench.stub_engine FILE`` with a JSON file of :class:`Script`; it prints its port.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_SEED = re.compile(rb'"sampling_seed": *(\d+)')
_STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
_DONE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


@dataclass(frozen=True)
class Script:
    """What the stub says, and how fast."""

    segments: list[list[int]]  # token ids; the last ends the segment
    texts: list[list[str]]  # the text of each token
    matched: list[str]  # the stop string that each segment ends with; "": end of sequence
    chunk_tokens: int
    tokens_per_s: float  # of each stream
    first_s: float  # seconds until the first chunk


class Segments:
    """The plan's segments as byte strings ready to send, one per chunk."""

    def __init__(self, plan: Script) -> None:
        self.plan = plan
        self._wire = [self._encode(number) for number in range(len(plan.segments))]

    def __getitem__(self, seed: int) -> list[bytes]:
        return self._wire[seed % len(self._wire)]

    def _encode(self, number: int) -> list[bytes]:
        tokens, texts, size = self.plan.segments[number], self.plan.texts[number], self.plan.chunk_tokens
        wire: list[bytes] = []
        for begin in range(0, len(tokens), size):
            end = min(begin + size, len(tokens))
            part = tokens[begin:end]
            finish = {"type": "stop", "matched": self.plan.matched[number] or part[-1]}
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
            body = b"data: " + orjson.dumps(message) + b"\n\n"
            if end == len(tokens):
                body += b"data: [DONE]\n\n"
            framed = b"%x\r\n%b\r\n" % (len(body), body)
            wire.append(framed + b"0\r\n\r\n" if end == len(tokens) else framed)
        return wire


class _Connection(asyncio.Protocol):
    """One client connection, one request at a time."""

    def __init__(self, segments: Segments) -> None:
        self._segments, self._buffer = segments, b""
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = _LENGTH.search(head)
        size = int(length[1]) if length else 0
        if len(body) < size:
            return
        self._buffer = body[size:]
        assert self._transport is not None
        if b"/generate" not in head.partition(b"\r\n")[0]:
            self._transport.write(_DONE)
            return
        seed = _SEED.search(body)
        plan = self._segments.plan
        self._transport.write(_STREAM)
        due = asyncio.get_running_loop().time() + plan.first_s
        self._send_later(self._segments[int(seed[1]) if seed else 0], 0, due)

    def _send_later(self, wire: list[bytes], number: int, due: float) -> None:
        self._timer = asyncio.get_running_loop().call_at(due, self._send, wire, number, due)

    def _send(self, wire: list[bytes], number: int, due: float) -> None:
        assert self._transport is not None
        self._transport.write(wire[number])
        if number + 1 < len(wire):  # the pace holds on average, however late this one was
            plan = self._segments.plan
            self._send_later(wire, number + 1, due + plan.chunk_tokens / plan.tokens_per_s)


async def _serve(plan: Script) -> None:
    segments = Segments(plan)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(segments), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def write_script(plan: Script, path: Path) -> None:
    path.write_text(json.dumps(dataclasses.asdict(plan)))


if __name__ == "__main__":
    asyncio.run(_serve(Script(**json.loads(Path(sys.argv[1]).read_text()))))
