"""Reading SGLang's event stream: from messages, cumulative or incremental, to :class:`Chunk` after chunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from system.engine.entropy import TopEntropy, entropy_bounds
from system.engine.protocol import Chunk, EngineError, Finish
from system.engine.routes import RouteFormat
from system.tree.routes import Routes

MAX_MESSAGE_BYTES = 64 << 20
ROUNDING = 1e-2  # nats that a bound may be passed by: a server may compute in bfloat16
FLOAT32 = float(np.finfo(np.float32).max)


class MalformedStream(EngineError):
    """The server's answer contradicts itself or the protocol."""


class EventSplitter:
    """Cuts a byte stream into the JSON messages of its server-sent events."""

    def __init__(self) -> None:
        self._buffer = b""
        self.done = False  # the [DONE] mark has been read

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Messages completed by ``data``."""
        self._buffer += data
        if len(self._buffer) > MAX_MESSAGE_BYTES:
            raise MalformedStream(f"a message of more than {MAX_MESSAGE_BYTES} bytes")
        *events, self._buffer = self._buffer.split(b"\n\n")
        for event in events:
            body = event.removeprefix(b"data:").strip()
            if body == b"[DONE]":
                self.done = True
                return
            try:
                message = orjson.loads(body)
            except ValueError as error:
                raise MalformedStream(f"not JSON: {body[:80]!r}") from error
            if not isinstance(message, dict):
                raise MalformedStream(f"not an object: {body[:80]!r}")
            yield message


@dataclass(frozen=True, slots=True)
class WantedRoutes:
    """The records of experts that one call asks for: of the tokens from ``first`` on."""

    format: RouteFormat
    first: int
    prompt: int  # tokens of the call's prompt

    def read(self, meta: dict[str, Any], new: int) -> Routes:
        """Of a call that has ended with ``new`` tokens."""
        if meta.get("routed_experts") is None:
            raise MalformedStream(
                "routed_experts: the server has no record; start it with --enable-return-routed-experts, or "
                "set rollout.replay_routes=false"
            )
        return self.format.read(meta["routed_experts"], self.prompt + new - 1 - self.first)


class StreamReader:
    """Turns the messages of one ``/generate`` call into chunks of new tokens.

    SGLang repeats everything so far in each message unless it was started with
    ``--incremental-streaming-output``. ``completion_tokens`` counts the whole output either way, so the
    length of ``output_ids`` tells which it is.
    """

    def __init__(
        self,
        estimate: TopEntropy | None = None,
        vocab: int | None = None,
        scored: NDArray[np.int32] | None = None,
        routes: WantedRoutes | None = None,
    ) -> None:
        """``estimate``: what to make of the top log-probabilities of a server that gives no entropies.
        ``vocab``: tokens that the model knows; None: not known here.  ``scored``: the given tokens at the end
        of the prompt, one or more, whose log-probabilities were asked for.  ``routes``: which records of
        experts were.
        """
        self.count = 0  # output tokens of this call so far
        self.cached = 0  # prompt tokens that the server had in its cache
        self.estimated, self.error = 0, 0.0  # entropies that are estimates; nats they may be off, summed
        self._text = 0  # characters of text so far, when cumulative
        self._estimate, self._scored, self._routes = estimate, scored, routes
        known = math.inf if vocab is None else vocab
        # Rounding may take a log-probability or an entropy past its bound by a little.
        self._last_id, self._most_entropy = known - 1, min(math.log(known) + ROUNDING, FLOAT32)
        self._version = 0  # of the newest token so far

    def read(self, message: dict[str, Any]) -> tuple[Chunk, str]:
        """The new tokens in ``message`` and their text.  Raises :class:`MalformedStream`."""
        try:
            return self._read(message)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError) as error:
            raise MalformedStream(f"{type(error).__name__} in {str(message)[:200]}: {error}") from error

    def _read(self, message: dict[str, Any]) -> tuple[Chunk, str]:
        meta, ids = message["meta_info"], message["output_ids"]
        total = int(meta["completion_tokens"])
        new = total - self.count
        if new < 0 or len(ids) not in (total, new):
            raise MalformedStream(
                f"{len(ids)} tokens in a message that ends at token {total} after {self.count}"
            )
        cumulative = len(ids) == total
        start = self.count

        def fresh(values: list[Any]) -> list[Any]:
            if len(values) not in (total, new):
                raise MalformedStream(f"{len(values)} values for {new} new tokens of {total}")
            return values[len(values) - new :]

        pairs = fresh(meta["output_token_logprobs"])
        tokens = np.array(fresh(ids), np.int32)
        named = tokens.tolist()
        if [pair[1] for pair in pairs] != named:
            raise MalformedStream("output_token_logprobs and output_ids name different tokens")
        _within("output_ids", named, 0, self._last_id)
        kept = meta.get("output_token_sampling_logprobs")
        logprob = [pair[0] for pair in pairs] if kept is None else [_number(value) for value in fresh(kept)]
        text = str(message.get("text", ""))
        self.cached = int(meta.get("cached_tokens") or 0)
        if not 0 <= self.cached < 2**31:
            raise MalformedStream(f"cached_tokens: {self.cached} is out of range")
        finish = _finish(meta.get("finish_reason"))
        whole = finish is not None and finish.type != "abort"
        chunk = Chunk(
            tokens=tokens,
            logprob=_logprobs("output_token_logprobs", logprob),
            entropy=self._entropy(meta, fresh, new),
            version=self._versions(meta, start, total),
            finish=finish,
            cached_tokens=self.cached if finish else 0,
            scores=self._scores(meta) if self._scored is not None and new and not start else None,
            routes=self._routes.read(meta, total) if self._routes and whole else None,
        )
        self.count = total
        if cumulative:
            text, self._text = text[self._text :], len(text)
        return chunk, text

    def _versions(self, meta: dict[str, Any], start: int, stop: int) -> NDArray[np.int32]:
        """[stop - start] as :func:`versions`; they never fall."""
        order = [self._version, *versions(meta, start, stop)]
        if order != sorted(order):
            raise MalformedStream(f"weight_version: falls within one answer: {order}"[:200])
        self._version = order[-1]
        return np.array(order[1:], np.int32)

    def _scores(self, meta: dict[str, Any]) -> NDArray[np.float32]:
        """Log-probabilities of the given tokens that were asked for: the last entries of what may be more."""
        assert self._scored is not None
        pairs = meta["input_token_logprobs"][-self._scored.size :]
        named = np.array([pair[1] for pair in pairs], np.int64)
        # SGLang lists the vocabulary's last token as 0, for it may be padding.
        if named.shape != self._scored.shape or ((named != self._scored) & (named != 0)).any():
            raise MalformedStream("input_token_logprobs and the end of input_ids name different tokens")
        return _logprobs("input_token_logprobs", [pair[0] for pair in pairs])

    def _entropy(
        self, meta: dict[str, Any], fresh: Callable[[list[Any]], list[Any]], new: int
    ) -> NDArray[np.float32]:
        """[new] the server's own; else the middle of the bounds that its top tokens set; else NaN."""
        if (exact := meta.get("entropy")) is not None:
            return _numbers("entropy", fresh(exact), -ROUNDING, self._most_entropy)
        if self._estimate is None or not new:
            return np.full(new, math.nan, np.float32)
        top = [[entry[0] for entry in row] for row in fresh(meta["output_top_logprobs"])]
        low, high = entropy_bounds(top, self._estimate.vocab)
        self.estimated += new
        self.error += float((high - low).sum() / 2)
        return ((low + high) / 2).astype(np.float32)


def versions(meta: dict[str, Any], start: int, stop: int) -> list[int]:
    """[stop - start] weight version of each output token, from the spans where the server gives them."""
    found = [version_number(meta["weight_version"])] * (stop - start)
    for span in meta.get("weight_versions") or []:
        low, high = max(int(span["start"]), start), min(int(span["end"]), stop)
        if low < high:
            found[low - start : high - start] = [version_number(span["version"])] * (high - low)
    return found


def version_number(version: Any) -> int:
    """SGLang's versions are text and begin as "default"; ours are numbers and begin at 0.

    Raises :class:`MalformedStream` for what is none.
    """
    if version == "default":
        return 0
    text = str(version)
    if not (text.isascii() and text.isdigit() and len(text) < 11 and int(text) < 2**31):
        raise MalformedStream(f"weight_version: {text[:40]!r} is not a number from 0 to 2^31 - 1")
    return int(text)


def _number(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _logprobs(field: str, values: list[Any]) -> NDArray[np.float32]:
    return _numbers(field, values, -FLOAT32, ROUNDING)


def _numbers(field: str, values: list[Any], low: float, high: float) -> NDArray[np.float32]:
    """[k] ``values``, which are numbers from ``low`` to ``high``, both in the type's range."""
    try:
        _within(field, values, low, high)
        return np.array(values, np.float32)
    except (TypeError, MalformedStream):  # what is null becomes NaN, what is too large for the type infinite
        with np.errstate(over="ignore"):
            numbers = np.array(values, np.float32)
    if numbers.ndim != 1:
        raise MalformedStream(f"a list in place of a number in {values!r:.80}")
    _within(field, numbers, low, high)
    return numbers


def _within(field: str, values: Iterable[Any], low: float, high: float) -> None:
    """Raise :class:`MalformedStream` naming the field if a value is not a number from ``low`` to ``high``."""
    for value in values:  # a loop: of the few in a message, numpy's calls take longer
        if not low <= value <= high:  # nor is NaN
            raise MalformedStream(f"{field}: {value} is not a number from {low:g} to {high:g}")


def _finish(reason: dict[str, Any] | None) -> Finish | None:
    if reason is None:
        return None
    kind = reason["type"]
    if kind not in ("stop", "length", "abort"):
        raise MalformedStream(f"unknown finish reason {kind!r}")
    if kind == "abort" and 400 <= (reason.get("status_code") or 0) < 500:  # found out late to be impossible
        raise EngineError(f"request refused: {reason.get('message')}")
    return Finish(kind, matched=reason.get("matched"), message=str(reason.get("message") or ""))


class CutGuard:
    """Finds a stop string that began before a resumed stream was cut and is completed after it.

    The server that goes on sees the first part as prompt, so only the client can notice.
    """

    def __init__(self, stops: tuple[str, ...]):
        self._stops = stops
        self._reach = max(map(len, stops), default=1) - 1
        self._tail = ""  # the last characters that were generated
        self._window = ""  # the tail at the cut, and what came after
        self._edge = 0  # characters of the window that stood before the cut

    def cut(self) -> None:
        """The stream broke here."""
        self._window, self._edge = self._tail, len(self._tail)

    @property
    def watching(self) -> bool:
        """Whether the next tokens could still complete a stop string that spans the cut."""
        return self._edge > 0

    def feed(self, text: str) -> str | None:
        """Take in new text; the stop string it completed across the cut, if any."""
        joined = self._tail + text
        self._tail = joined[max(0, len(joined) - self._reach) :]
        if not self.watching:
            return None
        self._window += text
        for stop in self._stops:
            if 0 <= self._window.find(stop) < self._edge:
                return stop
        if len(self._window) - self._edge >= self._reach:
            self._window, self._edge = "", 0
        return None
