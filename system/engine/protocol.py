"""What the rest of the system says to an engine, whichever server stands behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from system.errors import EspalierError
from system.tree.routes import Routes

# What the digital twin's speed model of an engine is fitted to, as far as the server counts it.
SPEED_COUNTERS = (
    "busy_s",
    "steps",
    "row_steps",
    "prefill_tokens",
    "moment_rr",
    "moment_rp",
    "moment_pp",
    "moment_rt",
    "moment_pt",
)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample one continuation.  ``top_k`` -1 means off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None  # the same seed, prompt and weights give the same tokens

    def __post_init__(self) -> None:
        if self.ignore_eos and self.stop_token_ids:
            raise ValueError(
                "ignore_eos would switch stop_token_ids off too, as SGLang has it: use one of them"
            )


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    rid: str  # unique
    input_ids: NDArray[np.int32]  # [P]
    sampling: Sampling
    route: str = ""  # key of its tree, whose requests share at least their prompt: a hint for cache affinity
    parent: str = ""  # rid of the request whose tokens it goes on from: that one's server holds its prefix
    said: str = ""  # end of the text that this segment had produced when it was cut: stop strings may span it
    score_from: int | None = None  # scores of the given tokens from this one on, 1 or later, are wanted
    # The experts of the tokens from this one on are wanted, of a model that has some.
    routes_from: int | None = None


@dataclass(frozen=True, slots=True)
class Finish:
    """Why generation ended, in SGLang's terms.  ``matched`` is the stop string or stop/EOS token id."""

    type: Literal["stop", "length", "abort"]
    matched: str | int | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one request since the last chunk (never cumulative); all arrays have the same length [k].

    Tokens that completed a stop string, and the EOS token, are included.
    """

    tokens: NDArray[np.int32]
    # Behaviour log-probability: temperature applied, renormalised under top-p/top-k.
    logprob: NDArray[np.float32]
    # Nats, of the temperature-scaled distribution over the whole vocabulary; NaN: unknown.
    entropy: NDArray[np.float32]
    version: NDArray[np.int32]  # weight version of each token
    finish: Finish | None = None  # set on the last chunk only
    cached_tokens: int = 0  # prompt tokens served from KV cache (last chunk)
    # [P - score_from] log-probability of the given tokens, temperature applied, under the weights of the
    # first new token; with that one, where they were asked for.
    scores: NDArray[np.float32] | None = None
    # [P + all new tokens - 1 - routes_from, sparse layers, k] the experts that the tokens went through, of
    # all but the newest one (:mod:`system.tree.routes`); on the last chunk, where they were asked for.
    routes: Routes | None = None


class EngineError(EspalierError, RuntimeError):
    """The engine could not serve a request after the client's retries."""


class EngineLost(EngineError):
    """No server could be reached, or stayed, to serve a request: the fault is the servers', not its own."""


class Engine(Protocol):
    """What a rollout needs.  Implemented by the HTTP client, by test fakes and by the digital twin."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Stream chunks until one carries ``finish``.  Closing the iterator early aborts the request."""
        ...


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a server says about itself."""

    weight_version: int
    running: int = 0
    waiting: int = 0
    max_running: int = 0  # sequences decoded together at most; 0: unknown
    paused: bool = False
    counters: dict[str, float] = field(default_factory=dict)
