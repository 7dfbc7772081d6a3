"""What all ways of sending weights have in common."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, TypeVar
from urllib.parse import urlsplit

from system.engine.http import Http
from system.engine.protocol import EngineError
from system.http import is_loopback

if TYPE_CHECKING:  # whoever only generates does without PyTorch
    import torch

Bucket: TypeAlias = "Mapping[str, torch.Tensor]"  # full tensors on CPU under their Hugging Face names
Buckets: TypeAlias = "Iterable[Bucket] | AsyncIterable[Bucket]"
Outcome = TypeVar("Outcome")
Kv = Literal["recompute", "keep"]  # what running requests do with the keys and values of the old weights


class PushFailed(EngineError):
    """Some servers did not take new weights; ``failures`` says why, by URL.  The others serve them."""

    def __init__(self, failures: Mapping[str, EngineError], report: PushReport | None = None) -> None:
        super().__init__("; ".join(str(error) for error in failures.values()))
        self.failures = dict(failures)
        self.report = report or PushReport()


@dataclass(frozen=True, slots=True)
class PushReport:
    """What one push cost."""

    bytes: int = 0  # of weights, as the learner sent them
    stage_s: float = 0.0  # gathering, checking and staging, while generation went on
    # URL -> seconds in which it generated nothing, from the call to pause to the answer that it goes on;
    # empty where the server stages by itself and swaps at a token boundary.
    pause_s: Mapping[str, float] = field(default_factory=dict)


class Transport(Protocol):
    async def push(
        self, http: Http, urls: Sequence[str], buckets: Buckets, version: int, kv: Kv
    ) -> PushReport:
        """Bring the servers at ``urls`` to the weights in ``buckets``, as ``version``.

        The buckets together must hold every tensor of the model, and are read to their end in any case: the
        gather behind them is collective.  Returns once every server has proved by checksum that it holds what
        was sent, and goes on generating.  Raises :class:`PushFailed` for servers that do not; one that
        refused the weights by name or shape goes on with its old ones, one that may hold a part of the new
        ones stands paused.
        """
        ...

    def close(self) -> None:
        """Leave process groups and remove files."""
        ...


async def each(buckets: Buckets) -> AsyncIterator[Bucket]:
    """Iterate over either kind of buckets."""
    if isinstance(buckets, AsyncIterable):
        async for bucket in buckets:
            yield bucket
    else:
        for bucket in buckets:
            yield bucket


def by_outcome(
    urls: Sequence[str], outcomes: Sequence[Outcome | BaseException]
) -> tuple[dict[str, Outcome], dict[str, EngineError]]:
    """(results, failures) by URL, of one call to each of ``urls``; raises what is no :class:`EngineError`."""
    results: dict[str, Outcome] = {}
    failures: dict[str, EngineError] = {}
    for url, outcome in zip(urls, outcomes, strict=True):
        if isinstance(outcome, EngineError):
            failures[url] = outcome
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            results[url] = outcome
    return results, failures


def size(bucket: Bucket) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in bucket.values())


def on_this_host(url: str) -> bool:
    """Whether a server listens on loopback, and so shares this machine's memory."""
    return is_loopback(urlsplit(url).hostname or "")
