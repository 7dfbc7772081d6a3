"""Entropy where a server gives only its most likely tokens: an estimate, and how far off it can be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True)
class TopEntropy:
    """How to ask for and read an estimate: ``k`` top log-probabilities of ``vocab`` tokens."""

    k: int
    vocab: int


def entropy_bounds(top_logprob: ArrayLike, vocab: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least and greatest entropy, in nats, of distributions over ``vocab`` tokens with these ``[n, k]`` most
    likely ones.

    With the mass r left to the other V - k tokens, each of which is at most as likely as the k-th, p_k:
    ``r·ln(1/p_k)`` and ``r·ln((V - k)/r)`` bound what they add to the entropy of the top (the first because
    -ln p falls in p, the second because the uniform distribution has the most entropy).
    """
    logprob = np.asarray(top_logprob, np.float64)
    p = np.exp(logprob)
    top = -(p * logprob).sum(-1)
    rest = np.clip(1.0 - p.sum(-1), 0.0, None)
    others = max(vocab - logprob.shape[-1], 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        high = np.where(rest > 0, rest * np.log(others / rest), 0.0)
    low = rest * -logprob[..., -1]
    return top + np.minimum(low, high), top + high
