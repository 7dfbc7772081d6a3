"""How likely given tokens are: one prefill of the engine, and one new token that nobody reads."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from system.engine.protocol import Chunk, Engine, EngineError, GenerateRequest, Sampling


@dataclass(frozen=True, slots=True)
class Scores:
    """Of k given tokens, under the weights of one version."""

    logprob: NDArray[np.float32]  # [k] nats, temperature applied, over the whole vocabulary
    version: int


async def score(
    engine: Engine,
    tokens: NDArray[np.int32],
    start: int,
    *,
    rid: str,
    temperature: float = 1.0,
    route: str = "",
    parent: str = "",
) -> Scores:
    """The log-probabilities of ``tokens`` [P] from number ``start`` on, 1 <= ``start`` < P.

    They are log-softmax(logits / ``temperature``), in float32, as the learner has them; SGLang's are those of
    temperature 1 whatever is asked, which :mod:`system.config.check` refuses.  ``rid``, ``route``
    and ``parent`` as in :class:`GenerateRequest`; the context must have room for one more token.  It is a
    request like any other: retried, bounded by the engine's deadline, aborted when this is cancelled.  An
    update of the weights meanwhile has it computed anew, so that all of them are of one version.

    Raises :class:`EngineError` when the engine cannot, also after its retries.
    """
    if not 1 <= start < tokens.size:
        raise ValueError(f"start={start}: tokens 1 to {tokens.size - 1} can be scored")
    one = Sampling(max_new_tokens=1, temperature=temperature, ignore_eos=True, seed=0)
    request = GenerateRequest(rid, tokens, one, route, parent, score_from=start)
    found: Scores | None = None
    async with aclosing(cast(AsyncGenerator[Chunk], engine.generate(request))) as chunks:
        async for chunk in chunks:
            if chunk.scores is not None:
                found = Scores(chunk.scores, int(chunk.version[0]))
    if found is None:
        raise EngineError(f"request {rid!r}: no log-probabilities of the given tokens came")
    return found
