"""One turn of the model: from a prompt to recorded tokens and their view."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import cast

import numpy as np

from system.agents.answer import AnswerReader, Delta, Written
from system.agents.model import ServedModel
from system.engine.protocol import Chunk, EngineError, GenerateRequest
from system.rollout.encode import OPENING_TOKENS, decode, opening
from system.rollout.syntax.base import Syntax


async def write_turn(
    model: ServedModel,
    request: GenerateRequest,
    syntax: Syntax | None,
    stops: Sequence[str],
    say: Callable[[Sequence[Delta]], None],
) -> tuple[Chunk, Written, str]:
    """The turn that the engine writes: all its tokens as one chunk, what they say, and which of the client's
    ``stops`` was met.  ``say`` is told of text as it comes.

    The turn's last token is the one that completes the stop string; what the engine has sampled behind it is
    no part of the turn.  Raises :class:`EngineError` where the engine gives it up.
    """
    ends, tokenizer = model.rendering.ends, model.tokenizer
    opened = opening(decode(tokenizer, request.input_ids[-OPENING_TOKENS:], ends))
    reader = AnswerReader(tokenizer, ends, syntax, stops=stops, opened=opened)
    chunks: list[Chunk] = []
    stream = cast("AsyncGenerator[Chunk]", model.engine.generate(request))
    async with aclosing(stream):
        async for chunk in stream:
            chunks.append(_up_to_stop(chunk, reader, say))
            if reader.stopped:
                break
    whole = _joined(chunks)
    finish = whole.finish
    if not reader.stopped and (finish is None or finish.type == "abort"):
        raise EngineError(f"the engine gave the answer up: {finish.message if finish else 'no reason'}")
    rest, written = reader.finish(finish is not None and finish.type == "stop")
    say(rest)
    return whole, written, reader.stopped


def _up_to_stop(chunk: Chunk, reader: AnswerReader, say: Callable[[Sequence[Delta]], None]) -> Chunk:
    """Read ``chunk``; its tokens up to the one that completes a stop string, which finishes nothing."""
    for i, token in enumerate(chunk.tokens.tolist(), 1):
        if deltas := reader.feed(token):
            say(deltas)
        if reader.stopped:
            return Chunk(
                chunk.tokens[:i],
                chunk.logprob[:i],
                chunk.entropy[:i],
                chunk.version[:i],
                None,
                chunk.cached_tokens,
            )
    return chunk


def _joined(chunks: Sequence[Chunk]) -> Chunk:
    tokens, logprob, entropy, version = (
        np.concatenate([getattr(chunk, name) for chunk in chunks])
        for name in ("tokens", "logprob", "entropy", "version")
    )
    cached = max(chunk.cached_tokens for chunk in chunks)
    return Chunk(tokens, logprob, entropy, version, chunks[-1].finish, cached)
