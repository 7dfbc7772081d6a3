"""How leaf losses add up to one number: the weight w of every leaf, normalised over a whole optimizer step.

The loss is Σ over leaves of w · Σ over the leaf's MODEL tokens of the token loss.  The weights must be made
from all trees of the step, over all micro-batches and data-parallel ranks, so that nothing is averaged
twice: the released ARPO code takes the mean within each micro-batch, so under dynamic batching a token's
weight there depends on its neighbours.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from system.tree.pack import counts, path_model_tokens
from system.tree.record import Float32, Tree

Weights = list[NDArray[np.float64]]


def token_mean(lengths: Weights, unique: int, length_cap: int, hard: bool) -> Weights:
    """w = 1 / (tokens of the step): every token weighs the same  (DAPO, arXiv 2503.14476 §3.3).

    A shared token counts once per scored leaf through it, as if the paths were flat; with hard attribution,
    where it has multiplicity 1, it counts once.
    """
    total = unique if hard else sum(float(o.sum()) for o in lengths)
    return [(o > 0) / max(total, 1.0) for o in lengths]


def seq_mean(lengths: Weights, unique: int, length_cap: int, hard: bool) -> Weights:
    """w = 1 / (L·|o|): mean over a leaf's tokens, then over the step's L leaves (arXiv 2402.03300 eq. 3)."""
    leaves = max(sum(int((o > 0).sum()) for o in lengths), 1)
    return [(o > 0) / (leaves * np.maximum(o, 1.0)) for o in lengths]


def constant(lengths: Weights, unique: int, length_cap: int, hard: bool) -> Weights:
    """w = 1 / (L·length_cap): no preference for short or long answers  (Dr. GRPO, arXiv 2503.20783 §3.2)."""
    leaves = max(sum(int((o > 0).sum()) for o in lengths), 1)
    return [(o > 0) / (leaves * float(length_cap)) for o in lengths]


AGGREGATES: dict[str, Callable[[Weights, int, int, bool], Weights]] = {
    "token-mean": token_mean,
    "seq-mean": seq_mean,
    "constant": constant,
}


def leaf_weights(name: str, trees: Sequence[Tree], *, length_cap: int, hard: bool = False) -> list[Float32]:
    """[L] weight of each leaf of each tree of one optimizer step; 0 for leaves not scored or without MODEL
    tokens.

    ``length_cap``: the response-token budget of a branch, used by ``constant``.  ``hard``: whether the
    credit is (``credit.is_hard``); ``pack`` then gives a shared token the mean weight of its leaves instead
    of their sum, so under ``seq-mean`` and ``constant`` sharing makes the step's total weight smaller.
    ``L`` counts the leaves with a weight.  Raises ValueError for an unknown name.
    """
    if name not in AGGREGATES:
        close = difflib.get_close_matches(name, AGGREGATES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(AGGREGATES)}"
        raise ValueError(f"unknown aggregate {name!r}; {hint}")
    if length_cap < 1:
        raise ValueError(f"length_cap={length_cap} must be at least 1")
    lengths = [np.where(tree.scored, path_model_tokens(tree), 0).astype(np.float64) for tree in trees]
    weights = AGGREGATES[name](lengths, counts(trees).unique, length_cap, hard)
    return [w.astype(np.float32) for w in weights]
