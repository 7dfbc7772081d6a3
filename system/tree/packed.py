"""What the learner consumes: trees packed into one row of tokens, with per-token weights (``pack.py``)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch: N tokens of one or more (parts of) trees, each in depth-first pre-order, then padding.

    Token i may attend to token j iff ``j <= i < exit[j]``.  The logits at ``predictor[t]`` predict token t;
    several children of one fork share a predictor.  All weights are already normalised over the whole
    optimizer step (all micro-batches, all data-parallel ranks), so the learner only sums:

    loss = -Σ_t tis_t · (s_plus·min(r, 1+ε_hi) + s_minus·min(max(r, 1-ε_lo), c))  with r = π_θ/π_proximal.

    A token outside the loss (prompt, tool, padding, an ancestor repeated in a later part of a cut tree) has
    s_plus = s_minus = mult = 0.
    """

    tokens: NDArray[np.int32]  # [N]
    position: NDArray[np.int32]  # [N] depth along the root path, for rotary embeddings
    exit: NDArray[np.int32]  # [N] one past the last token that may attend to this one
    predictor: NDArray[np.int32]  # [N] index whose logits predict this token; -1: none (first token, padding)
    s_plus: NDArray[np.float32]  # [N] Σ w·max(A, 0) over the leaves below
    s_minus: NDArray[np.float32]  # [N] Σ w·min(A, 0) over the leaves below
    mult: NDArray[np.float32]  # [N] Σ w over the scored leaves below (weighs entropy bonus, KL, diagnostics)
    logprob: NDArray[np.float32]  # [N] behaviour log-probability
    version: NDArray[np.int32]  # [N] behaviour weight version, -1 off the loss
    tree: NDArray[np.int32]  # [N] which tree of the batch, -1 for padding

    @property
    def n_tokens(self) -> int:
        return int(self.tokens.shape[0])
