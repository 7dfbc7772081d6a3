"""Drawing tokens: temperature, top-k, top-p, with the log-probabilities and the entropy that training needs.

Every row draws by inverting its cumulative distribution at one uniform number, and that number is a hash of
the request's seed and the token's absolute position.  A draw therefore depends on seed, prompt and weights
only, never on which other rows happen to be in the batch, nor on whether generation was interrupted and
resumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def scrambled(seed: int) -> np.uint64:
    """A request's seed, ready for :func:`uniforms`; seeds k and k+1 must not give shifted streams."""
    return _mix(np.array([seed], np.uint64) + _GOLDEN)[0]


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """[N] numbers in [0, 1), 52 random bits each: SplitMix64 (Steele et al. 2014) of seed and counter."""
    state = seeds + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    return (_mix(state) >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class Truncation:
    """The K rows with top-k or top-p."""

    rows: Tensor  # [K] int64
    top_p: Tensor  # [K, 1] float32
    top_k: Tensor  # [K, 1] int64


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Sampling parameters of the N rows of a step, on the device; rebuilt only when the rows change."""

    inverse_temperature: Tensor | None  # [N, 1] float32, 1 for greedy rows; None: all are 1
    greedy: Tensor | None  # [N] bool; None: no row is greedy
    truncation: Truncation | None  # None: no row has top-k or top-p

    @classmethod
    def build(
        cls,
        temperature: NDArray[np.float32],
        top_p: NDArray[np.float32],
        top_k: NDArray[np.int64],
        vocab: int,
        device: torch.device,
    ) -> SamplingBatch:
        """From [N] arrays; temperature 0 is greedy, ``top_k`` -1 and ``top_p`` 1 are off."""
        greedy = temperature == 0
        own = np.where(greedy, 1.0, temperature)
        limit = np.where(top_k < 1, vocab, top_k)
        rows = np.flatnonzero(~greedy & ((limit < vocab) | (top_p < 1)))

        def put(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(device)

        return cls(
            inverse_temperature=None if (own == 1).all() else put((1.0 / own).astype(np.float32)[:, None]),
            greedy=put(greedy) if greedy.any() else None,
            truncation=Truncation(put(rows), put(top_p[rows, None]), put(limit[rows, None]))
            if rows.size
            else None,
        )


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token per row, on the host."""

    tokens: NDArray[np.int64]  # [N]
    # [N, 3] log-probability under the temperature-scaled distribution over the whole vocabulary; the same
    # renormalised over what top-k and top-p kept; entropy of that distribution in nats
    numbers: NDArray[np.float64]


def sample(logits: Tensor, batch: SamplingBatch, uniform: NDArray[np.float64]) -> Sampled:
    """Draw from float32 ``logits [N, V]``.  Greedy rows report log-probability and entropy at
    temperature 1.
    """
    scaled = logits if batch.inverse_temperature is None else logits * batch.inverse_temperature
    p = torch.softmax(scaled, -1)
    # ln Z by the likeliest token: its probability is never tiny, so nothing is lost in the logarithm.
    log_z = scaled.amax(-1) - p.amax(-1).log()
    entropy = log_z - torch.linalg.vecdot(p, scaled)
    if (cut := batch.truncation) is not None:
        p[cut.rows] = truncate(p[cut.rows], cut.top_p, cut.top_k)
    # In float64: a float32 running sum would make the rarest tokens of a large vocabulary unreachable.
    cumulative = p.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    target = torch.from_numpy(uniform[:, None]).to(logits.device) * total
    token = torch.searchsorted(cumulative, target, right=True)
    if batch.greedy is not None:
        token = torch.where(batch.greedy[:, None], logits.argmax(-1, keepdim=True), token)
    logprob = (scaled.gather(1, token)[:, 0] - log_z).double()
    kept = logprob
    if cut is not None:
        kept = logprob.clone()
        kept[cut.rows] -= total[cut.rows, 0].log()
    host = torch.stack([token[:, 0].double(), logprob, kept, entropy.double()], -1).cpu().numpy()
    return Sampled(host[:, 0].astype(np.int64), host[:, 1:])


def truncate(p: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Zero what top-k and top-p drop from probabilities ``p [K, V]``; the rest is not renormalised.

    Both limits look at the full distribution (SGLang's joint order): of the tokens in falling probability the
    first ``top_k`` stay, and of these each whose predecessors together weigh at most ``top_p``.
    """
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1, dtype=torch.float64) - ordered
    rank = torch.arange(p.shape[-1], device=p.device)
    kept = ordered.masked_fill((rank >= top_k) | (before > top_p), 0.0)
    return torch.zeros_like(p).scatter_(-1, order, kept)
