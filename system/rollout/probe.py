"""What is known around a tool result when the policy is asked whether the tree forks there."""

from __future__ import annotations

import numpy as np

from system.rollout.branch import Branch
from system.rollout.branching import Probe
from system.tree.builder import TreeBuilder
from system.tree.record import Int32, Kind


def probe(growth: TreeBuilder, branch: Branch, result: int, tokens: int) -> Probe:
    """Of ``branch`` at the end of TOOL node ``result``, by the first ``tokens`` tokens of its newest segment:
    the one after the result or, for a policy that decides at once, before it.
    """
    node = branch.node if growth.kind(branch.node) == Kind.MODEL else growth.path(branch.node)[-2]
    own = growth.tokens(node)[:tokens]
    others = [growth.tokens(other)[:tokens] for other in growth.children(result) if other != node]
    return Probe(
        branch.entropy,
        branch.baseline,
        growth.entropies(node)[:tokens],
        growth.logprobs(node)[:tokens],
        tuple(shared_start(own, other) for other in others if other.size),
    )


def shared_start(one: Int32, other: Int32) -> float:
    """The share of the tokens that both have, of which there is one at least, before the first difference."""
    both = min(one.size, other.size)
    differs = np.flatnonzero(one[:both] != other[:both])
    return float(differs[0] if differs.size else both) / both
