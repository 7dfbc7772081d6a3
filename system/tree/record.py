"""The record that travels through the whole system: one prompt and every branch grown from it.

A :class:`Tree` is a set of flat numpy arrays, so Ray's object store moves it without a copy and the learner
packs it without touching Python objects per token.  Nodes stand in depth-first pre-order: a node comes before its
descendants and a subtree is one contiguous run of nodes (and of tokens), which turns ancestry into an interval
test.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Int8 = NDArray[np.int8]


class Kind(IntEnum):
    """Who wrote a node's tokens.  Only MODEL tokens are ever trained on."""

    PROMPT = 0
    MODEL = 1
    TOOL = 2


class Outcome(IntEnum):
    """Why a branch ended."""

    STOPPED = 0  # the model ended the sequence itself (EOS)
    LENGTH = 1  # the branch's response-token budget is spent
    CALL_LIMIT = 2  # it asked for one more tool call than it may make
    DEADLINE = 3  # the branch's or the tree's deadline passed
    ENGINE_ERROR = 4  # the engine gave up on it after its retries
    CANCELLED = 5  # cut off from outside (shutdown, abort)

    @property
    def scored(self) -> bool:
        """Whether the reward of such a branch says something about the policy (a deadline of ours does not)."""
        return self in (Outcome.STOPPED, Outcome.LENGTH, Outcome.CALL_LIMIT)


class Origin(IntEnum):
    """Where a leaf's branch came from; over a tree, roots + forks + top_ups == n."""

    ROOT = 0
    FORK = 1
    TOP_UP = 2


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One tool call and what came of it."""

    node: int  # the TOOL node that holds the result
    tool: str
    arguments: dict[str, Any]
    status: str  # a ``ToolStatus`` value
    latency_s: float
    cached: bool = False
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class ForkDecision:
    """One decision of a branching policy, taken after a tool result, whether or not it forked."""

    node: int  # the TOOL node whose end is the fork point
    delta_h: float  # ΔH: normalised probe entropy minus the branch's baseline
    probability: float  # chance of each fork that the policy stated
    draw: float  # the uniform draw it was compared with (NaN when the policy draws none)
    forks: int  # how many branches it started


@dataclass(frozen=True, slots=True)
class Tree:
    """A closed trajectory tree.  T tokens, J nodes, L leaves; nodes in depth-first pre-order.

    A leaf may be any node, also one with children (a branch that ended exactly where a sibling went on), and two
    leaves may name the same node.
    """

    prompt_id: str  # identity of the prompt in the ledger
    task: str  # kind of question, for metrics ("lookup", "calc", ...)
    tokens: Int32  # [T] token ids
    logprob: Float32  # [T] behaviour log-probability, nats; 0 on PROMPT and TOOL tokens
    entropy: Float32  # [T] entropy of the sampling distribution, nats; NaN where unknown
    version: Int32  # [T] weight version that produced the token, stamped by the engine; -1 on PROMPT and TOOL
    start: Int32  # [J] index of the node's first token
    parent: Int32  # [J] parent node, -1 for the root
    kind: Int8  # [J] a ``Kind``
    leaf: Int32  # [L] the node each leaf ends at
    reward: Float32  # [L] score; NaN when the leaf was not scored
    correct: Int8  # [L] 1 right answer, 0 wrong, -1 not scored
    outcome: Int8  # [L] an ``Outcome``
    origin: Int8  # [L] an ``Origin``
    calls: tuple[ToolCall, ...] = ()
    forks: tuple[ForkDecision, ...] = ()
    budget: int = 0  # n, the leaf budget it was grown under
    started_s: float = 0.0  # unix time of the first root
    closed_s: float = 0.0  # unix time at which it closed
    meta: dict[str, Any] = field(default_factory=dict)  # JSON-able: question, gold answer, times by cause, ...

    @property
    def n_tokens(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def n_nodes(self) -> int:
        return int(self.start.shape[0])

    @property
    def n_leaves(self) -> int:
        return int(self.leaf.shape[0])

    @property
    def end(self) -> Int32:
        """[J] one past each node's last own token."""
        return np.append(self.start[1:], np.int32(self.n_tokens)).astype(np.int32)

    def path(self, leaf: int) -> list[int]:
        """Nodes from the root to leaf number ``leaf``, in order."""
        node = int(self.leaf[leaf])
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = int(self.parent[node])
        return nodes[::-1]

    def origins(self, origin: Origin) -> int:
        """How many leaves began as ``origin``."""
        return int((self.origin == origin).sum())
