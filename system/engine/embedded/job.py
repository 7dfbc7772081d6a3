"""One generation request inside the engine: parsed, checked, and what is still to be told to its caller."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from system.engine.embedded.stops import StopStrings, TokenBytes
from system.engine.protocol import Finish
from system.errors import EspalierError
from system.tree.routes import Routes

MAX_STOPS, MAX_STOP_BYTES = 32, 256
N = TypeVar("N", int, float)


class BadRequest(EspalierError, ValueError):
    """The request cannot be served as written (HTTP 400); the message names the field."""


@dataclass(slots=True)
class Event:
    """New tokens of one job, all produced under one weight version."""

    tokens: list[int]
    logprob: list[float]  # before top-p/top-k
    kept_logprob: list[float]  # renormalised over what they kept
    entropy: list[float]
    version: int
    finish: Finish | None = None
    cached_tokens: int = 0
    routes: Routes | None = None  # with the finish, if they are wanted: of all tokens but the newest
    error: str = ""  # set when the engine failed; nothing follows


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way through the scheduler."""

    rid: str
    prompt: NDArray[np.int32]  # [P]
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int = 0
    chunk: int | None = None  # tokens per event; None: the engine's own
    ignore_eos: bool = False
    stop_ids: frozenset[int] = frozenset()
    stops: StopStrings | None = None
    deliver: Callable[[Event], None] = lambda event: None  # called on the server's event loop
    told: int = 0  # tokens that the caller has heard of
    score_from: int | None = None  # log-probabilities of the prompt are wanted from this token on
    scores: list[float] = field(default_factory=list[float])  # these, complete before the first event
    routes_from: int | None = None  # experts of the tokens from this one on are wanted
    tokens: NDArray[np.int32] = field(init=False)  # prompt and generated so far
    version: int = -1  # of the weights that its tokens are made with, once it runs
    cached_tokens: int = -1  # prompt tokens found in the KV cache at first admission; -1: not admitted yet

    def __post_init__(self) -> None:
        self.tokens = self.prompt

    @property
    def reusable(self) -> NDArray[np.int32]:
        """Tokens whose keys and values may be another's: what predicts a wanted token is computed."""
        return self.tokens[:-1] if self.score_from is None else self.tokens[: self.score_from - 1]


_SAMPLING = {
    "max_new_tokens", "temperature", "top_p", "top_k", "stop", "stop_token_ids", "ignore_eos",
    "sampling_seed", "stream_interval",
    # Accepted and without effect: stop strings and special tokens are always in the output.
    "no_stop_trim", "skip_special_tokens", "spaces_between_special_tokens",
}  # fmt: skip


def parse(
    body: Mapping[str, Any],
    *,
    vocab: int,
    context: int,
    vocabulary: TokenBytes | None,
    draw_seed: Callable[[], int],
    experts: bool,
) -> Job:
    """Check a ``/generate`` body (SGLang's fields) and make a job of it.  Raises :class:`BadRequest`."""
    if body.get("stream") is not True:
        raise BadRequest("stream: expected true, for answers come as streams only")
    rid = body.get("rid")
    if not isinstance(rid, str) or not 0 < len(rid) <= 512:
        raise BadRequest("rid: expected a string of 1 to 512 characters")
    prompt = _token_ids(body.get("input_ids"), "input_ids", vocab)
    if not prompt:
        raise BadRequest("input_ids: expected at least one token id")
    sampling = body.get("sampling_params", {})
    if not isinstance(sampling, Mapping):
        raise BadRequest("sampling_params: expected a JSON object")
    if unknown := sorted(set(sampling) - _SAMPLING):
        raise BadRequest(f"sampling_params.{unknown[0]}: not supported by the embedded engine")
    longest = context - len(prompt)
    new = _number(sampling, "max_new_tokens", 128, 1)
    if longest < 1 or new > longest:
        raise BadRequest(
            f"input_ids and max_new_tokens: {len(prompt)} prompt tokens and {new} new ones exceed "
            f"the context length of {context}"
        )
    if (start := body.get("logprob_start_len", -1)) != -1:
        if type(start) is not int or not 0 <= start < len(prompt) - 1:
            raise BadRequest(f"logprob_start_len: expected -1 (off) or one of 0 to {len(prompt) - 2}")
        if new != 1:
            raise BadRequest("logprob_start_len: scores come with one new token: max_new_tokens must be 1")
    routes_from = None
    if body.get("return_routed_experts", False):
        if not experts:
            raise BadRequest("return_routed_experts: the model has no experts")
        routes_from = body.get("routed_experts_start_len", 0)
        if type(routes_from) is not int or not 0 <= routes_from <= len(prompt):
            raise BadRequest(f"routed_experts_start_len: expected one of 0 to {len(prompt)}")
    top_k, top_p = _number(sampling, "top_k", -1, -1), _number(sampling, "top_p", 1.0, 0.0, 1.0)
    if top_k == 0:
        raise BadRequest("sampling_params.top_k: -1 (off) or at least 1")
    if top_p == 0:
        raise BadRequest("sampling_params.top_p: expected a number above 0")
    if sampling.get("sampling_seed") is None:
        seed = draw_seed()
    else:
        seed = _number(sampling, "sampling_seed", 0, -(2**63), 2**64 - 1) % 2**64
    stop = sampling.get("stop") or []
    return Job(
        rid=rid,
        prompt=np.asarray(prompt, np.int32),
        max_new_tokens=new,
        temperature=_number(sampling, "temperature", 1.0, 0.0, 100.0),
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        chunk=_number(sampling, "stream_interval", 1, 1) if "stream_interval" in sampling else None,
        ignore_eos=bool(sampling.get("ignore_eos", False)),
        stop_ids=frozenset(_token_ids(sampling.get("stop_token_ids") or [], "stop_token_ids", vocab)),
        stops=_stop_strings([stop] if isinstance(stop, str) else stop, vocabulary),
        score_from=None if start == -1 else start + 1,
        routes_from=routes_from,
    )


def _stop_strings(stop: Any, vocabulary: TokenBytes | None) -> StopStrings | None:
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise BadRequest("sampling_params.stop: expected a string or a list of non-empty strings")
    if len(stop) > MAX_STOPS or any(len(text.encode()) > MAX_STOP_BYTES for text in stop):
        raise BadRequest(f"sampling_params.stop: at most {MAX_STOPS} strings of {MAX_STOP_BYTES} bytes")
    if not stop:
        return None
    if vocabulary is None:
        raise BadRequest("sampling_params.stop: the model directory has no tokenizer to match strings with")
    return vocabulary.stop_strings(tuple(stop))


def _token_ids(value: Any, name: str, vocab: int) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise BadRequest(f"{name}: expected a list of integers")
    if value and not 0 <= min(value) <= max(value) < vocab:
        raise BadRequest(f"{name}: token ids must lie between 0 and {vocab - 1}")
    return value


def _number(source: Mapping[str, Any], name: str, default: N, low: float, high: float = math.inf) -> N:
    """Within the bounds, both included (and so no NaN); an integer where the default is one."""
    value, whole = source.get(name, default), isinstance(default, int)
    if type(value) not in ((int,) if whole else (int, float)) or not low <= value <= high:
        kind = "an integer" if whole else "a number"
        bound = f"of at least {low}" if high == math.inf else f"between {low} and {high}"
        raise BadRequest(f"sampling_params.{name}: expected {kind} {bound}")
    return type(default)(value)
