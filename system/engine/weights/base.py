"""What all ways of sending weights have in common."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, TypeVar
from urllib.parse import urlsplit

from system.engine.control import Http
from system.engine.protocol import EngineError
from system.http import is_loopback

if TYPE_CHECKING:  # whoever only generates does without PyTorch
    import torch

# Full tensors under their Hugging Face names: on CPU, or where they were gathered (``Transport.on_gpu``).
Bucket: TypeAlias = "Mapping[str, torch.Tensor]"
Buckets: TypeAlias = "Iterable[Bucket] | AsyncIterable[Bucket]"
Outcome = TypeVar("Outcome")
Kv = Literal["recompute", "keep"]  # what running requests do with the keys and values of the old weights
GROUP_DEADLINE_S = (
    60.0  # for the members of a process group to come together, and for one bucket to reach all
)


@dataclass(frozen=True, slots=True)
class PushReport:
    """What became of one push, and what it cost."""

    bytes: int = 0  # of weights, as the learner sent them
    stage_s: float = 0.0  # gathering, checking and staging, while generation went on
    # URL -> seconds in which it generated nothing, from the call to pause to the answer that it goes on;
    # empty where the server stages by itself and swaps at a token boundary.
    pause_s: Mapping[str, float] = field(default_factory=dict)
    # URL -> why the server did not take the weights; all others serve them
    failures: Mapping[str, str] = field(default_factory=dict)
    # Of weights that adapters were merged into: the share of their change that rounding left (Rounding.kept).
    lora_kept: float | None = None


class Transport(Protocol):
    @property
    def on_gpu(self) -> bool:
        """Whether buckets may stay on the GPU that gathered them; else they are wanted on CPU."""
        ...

    async def push(
        self, http: Http, urls: Sequence[str], buckets: Buckets, version: int, kv: Kv
    ) -> PushReport:
        """Bring the servers at ``urls`` to the weights in ``buckets``, as ``version``.

        The buckets together must hold every tensor of the model, and are read to their end in any case: the
        gather behind them is collective.  Returns once every server has proved by checksum that it holds what
        was sent, and goes on generating, or has failed: one that refused the weights by name or shape goes on
        with its old ones, one that may hold a part of the new ones stands paused.
        """
        ...


async def each(buckets: Buckets) -> AsyncIterator[Bucket]:
    """Iterate over either kind of buckets."""
    if isinstance(buckets, AsyncIterable):
        async for bucket in buckets:
            yield bucket
    else:
        for bucket in buckets:
            yield bucket


async def outcomes(
    calls: Mapping[str, Awaitable[Outcome]],
) -> tuple[dict[str, Outcome], dict[str, str]]:
    """(results, failures) by URL, of one call to each; raises what is no :class:`EngineError`."""
    results: dict[str, Outcome] = {}
    failures: dict[str, str] = {}
    done = await asyncio.gather(*calls.values(), return_exceptions=True)
    for url, outcome in zip(calls, done, strict=True):
        if isinstance(outcome, EngineError):
            failures[url] = str(outcome)
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
