"""The record that travels through the whole system: one prompt and every branch grown from it.

A :class:`Tree` is a set of flat numpy arrays, so Ray's object store moves it without a copy and the learner
packs it without touching Python objects per token.  Nodes stand in depth-first pre-order: a node comes
before its descendants and a subtree is one contiguous run of nodes (and of tokens), which turns ancestry
into an interval test.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from system.errors import EspalierError
from system.tree.routes import Routes, no_routes, route_defect

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Int8 = NDArray[np.int8]
Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]
_Number = TypeVar("_Number", np.int64, np.float64)


class TreeError(EspalierError, ValueError):
    """A tree that breaks the record's rules; the message names the defect."""


class Kind(IntEnum):
    """Who wrote a node's tokens.  Only MODEL tokens are trained on, and EXPERT tokens where those who went on
    from them earned more than others (:func:`system.tree.plan.node_credit`).
    """

    PROMPT = 0
    MODEL = 1
    TOOL = 2
    EXPERT = 3  # a turn of a demonstration: nothing sampled it


class Outcome(IntEnum):
    """Why a branch ended."""

    STOPPED = 0  # the model ended the sequence itself (EOS)
    LENGTH = 1  # the branch's response-token budget is spent
    CALL_LIMIT = 2  # it asked for one more tool call than it may make
    DEADLINE = 3  # the branch's or the tree's deadline passed
    ENGINE_ERROR = 4  # the engine gave up on it after its retries
    CANCELLED = 5  # cut off from outside (shutdown, abort)
    ENDED = 6  # its environment said that the episode is over
    ENVIRONMENT = 7  # its environment failed: there is no world any more to act in
    TURN_LIMIT = 8  # it said one thing more than its environment answers

    @property
    def scored(self) -> bool:
        """Whether the reward of such a branch says something about the policy (our deadline does not)."""
        return self in _SCORED


_SCORED = (Outcome.STOPPED, Outcome.LENGTH, Outcome.CALL_LIMIT, Outcome.ENDED, Outcome.TURN_LIMIT)


class Origin(IntEnum):
    """Where a leaf's branch came from; over a tree, roots + forks + top_ups == n."""

    ROOT = 0
    FORK = 1
    TOP_UP = 2


class Mishap(NamedTuple):
    """What went wrong in a tree and did not end it: counted, and the first of a kind is told."""

    kind: str  # a word for counters: "engine", "tool", "reward"
    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One tool call and what came of it."""

    node: int  # the TOOL node that holds the result
    tool: str  # one that there is; "" for a call that names none of them
    arguments: dict[str, Any]
    status: str  # a ``ToolStatus`` value
    latency_s: float
    cached: bool = False
    attempts: int = 1
    # Seconds after the tree's start at which it was made; below 0: not known, as of an older version.
    began_s: float = field(default=-1.0, compare=False)


@dataclass(frozen=True, slots=True)
class ForkDecision:
    """One decision of a branching policy, taken after a tool result, whether or not it forked."""

    node: int  # the TOOL node whose end is the fork point
    delta_h: float  # ΔH: normalised probe entropy minus the branch's baseline
    probability: float  # chance of each fork that the policy stated
    draw: float  # the uniform draw it was compared with (NaN when the policy draws none)
    forks: int  # how many branches it started
    scheduled: int = 0  # of these, those that the schedule added to what the policy asked for


@dataclass(frozen=True, slots=True)
class Tree:
    """A closed trajectory tree.  T tokens, J nodes, L leaves; nodes in depth-first pre-order.

    A leaf may be any node, also one with children (a branch that ended exactly where a sibling went on),
    and two leaves may name the same node.

    The root is the prompt that is trained under.  A guided tree was sampled from another one, which also told
    the first actions of a demonstration: ``sampled_prompt``.  Its log-probabilities are under that one.
    """

    prompt_id: str  # identity of the prompt in the ledger
    task: str  # kind of question, for metrics ("lookup", "calc", ...)
    tokens: Int32  # [T] token ids
    logprob: Float32  # [T] behaviour log-probability, nats; 0 where nothing sampled
    entropy: Float32  # [T] entropy of the sampling distribution, nats; NaN where unknown
    version: Int32  # [T] weight version that produced the token, stamped by the engine; -1 where nothing did
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
    meta: dict[str, Any] = field(default_factory=dict)  # JSON-able: question, gold answer, waits, ...
    # With ``rollout.rescore``, else empty: [T] log-probability of a token under the weights that the engine
    # held when its node closed, nats, NaN where it was not scored; [T] the version of these, -1 there.
    closed_logprob: Float32 = field(default_factory=lambda: np.zeros(0, np.float32))
    closed_version: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))
    # With ``teacher.urls``, else empty: [T] log-probability of a token under the teacher, nats, NaN where it
    # was not scored.
    teacher_logprob: Float32 = field(default_factory=lambda: np.zeros(0, np.float32))
    # With ``rollout.replay_routes``, else empty: [T, sparse layers, k] the experts that a token went through
    # when the engine computed its keys and values (:mod:`system.tree.routes`).
    routes: Routes = field(default_factory=no_routes)
    # With ``rollout.score_answer``, else empty: [J] mean log-probability, over its tokens, of the gold answer
    # behind this node, under the weights of then, nats; NaN on MODEL nodes and where it was not scored.
    answer_logprob: Float32 = field(default_factory=lambda: np.zeros(0, np.float32))
    # [P] the prompt that all below was sampled from; none: the root's own tokens
    sampled_prompt: Int32 = field(default_factory=lambda: np.empty(0, np.int32))
    guide: int = 0  # actions of a demonstration that it tells
    # [J] what an environment gave for the turn that ends with this node, part of the rewards of all leaves
    # below; none: it gave nothing.
    step_reward: Float32 = field(default_factory=lambda: np.zeros(0, np.float32))
    # [L] the run of an agent that each leaf is of, numbered from 0: its requests may have had several ends.
    # Leaves of one episode share reward, outcome and origin, and count once; none: each leaf is its own.
    episode: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))
    # [J] seconds after ``started_s`` at which a node was opened (a MODEL node's request made, a TOOL node's
    # answer there), and at which its first and its last token came; NaN on the root, and on a part of a node
    # that others go on from inside, where the part does not begin or end with the node.  None of the three:
    # nobody looked at a clock.
    opened_s: Float32 = field(default_factory=lambda: np.zeros(0, np.float32))
    first_s: Float32 = field(default_factory=lambda: np.zeros(0, np.float32))
    last_s: Float32 = field(default_factory=lambda: np.zeros(0, np.float32))

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
    def rescored(self) -> bool:
        """Whether some nodes were scored when they closed."""
        return self.closed_logprob.size > 0

    @property
    def taught(self) -> bool:
        """Whether a teacher scored some nodes."""
        return self.teacher_logprob.size > 0

    @property
    def routed(self) -> bool:
        """Whether the experts of some tokens were recorded."""
        return self.routes.size > 0

    @property
    def guided(self) -> bool:
        """Whether it was sampled from another prompt than it is trained under."""
        return self.sampled_prompt.size > 0

    @property
    def timed(self) -> bool:
        """Whether it is known when its nodes grew."""
        return self.opened_s.size > 0

    @property
    def end(self) -> Int32:
        """[J] one past each node's last own token."""
        return np.append(self.start[1:], np.int32(self.n_tokens)).astype(np.int32)

    def path(self, leaf: int) -> list[int]:
        """Nodes from the root to leaf number ``leaf``, in order."""
        return path(self.parent, int(self.leaf[leaf])).tolist()

    def origins(self, origin: Origin) -> int:
        """How many leaves began as ``origin``."""
        return int((self.origin == origin).sum())


_TYPES: dict[str, type] = {"Int32": np.int32, "Float32": np.float32, "Int8": np.int8}
# A tree's arrays and their types, as annotated.
ARRAYS = {field.name: _TYPES[str(field.type)] for field in fields(Tree) if str(field.type) in _TYPES}
# Those of a node each that may be empty.
OF_NODES = ("answer_logprob", "step_reward", "opened_s", "first_s", "last_s")
# All that may be empty; a file of before they were there has none.
OPTIONAL = (
    *("closed_logprob", "closed_version", "teacher_logprob"),
    *("answer_logprob", "sampled_prompt", "step_reward", "episode"),
    *("opened_s", "first_s", "last_s"),
)


_BELOW_ROOT = frozenset(Kind) - {Kind.PROMPT}
_OUTCOMES, _ORIGINS = frozenset(Outcome), frozenset(Origin)


def token_node(tree: Tree) -> Int32:
    """[T] the node each token belongs to."""
    return np.repeat(np.arange(tree.n_nodes, dtype=np.int32), np.diff(tree.start, append=tree.n_tokens))


def subtree_end(tree: Tree) -> Int32:
    """[J] one past each node's subtree: u descends from v, or is v, iff v <= u < subtree_end[v]."""
    size = subtree_sum(tree.parent, np.ones(tree.n_nodes, np.int64))
    return (np.arange(tree.n_nodes) + size).astype(np.int32)


def path(parent: Int32, node: int) -> Int64:
    """Nodes from the root to ``node``, in order."""
    nodes: list[int] = []
    while node >= 0:
        nodes.append(node)
        node = int(parent[node])
    return np.array(nodes[::-1], np.int64)


def path_sum(parent: NDArray[np.integer[Any]], values: NDArray[_Number]) -> NDArray[_Number]:
    """[J, ...] sum of ``values`` [J, ...] along each node's path from the root, itself included."""
    total, up = values.copy(), parent.tolist()
    for node in range(1, len(up)):  # parents before children
        total[node] += total[up[node]]
    return total


def subtree_sum(parent: Int32, values: NDArray[_Number]) -> NDArray[_Number]:
    """[J, ...] sum of ``values`` [J, ...] over each node's subtree, itself included."""
    total, up = values.copy(), parent.tolist()
    for node in range(len(up) - 1, 0, -1):  # children before parents
        total[up[node]] += total[node]
    return total


def leaf_sum(parent: Int32, leaf: Int32, values: NDArray[Any]) -> NDArray[np.float64]:
    """[J, ...] sum of ``values`` [L, ...] over the leaves at or below each node."""
    at_node = np.zeros((parent.shape[0], *values.shape[1:]), np.float64)
    np.add.at(at_node, leaf, values)
    return subtree_sum(parent, at_node)


def validate(tree: Tree) -> None:
    """Check every rule of the record; raises :class:`TreeError` naming the first defect found."""
    _check_arrays(tree)
    _check_nodes(tree)
    _check_leaves(tree)
    sampled = tree.kind[token_node(tree)] == Kind.MODEL
    for ok, defect in (
        (tree.version[sampled] >= 0, "a sampled token without a weight version"),
        (tree.version[~sampled] == -1, "a weight version on a token that was not sampled"),
        (np.isfinite(tree.logprob[sampled]), "a sampled token whose log-probability is not finite"),
        (tree.logprob[~sampled] == 0, "a log-probability on a token that was not sampled"),
        (tree.tokens >= 0, "a negative token id"),
        (np.isfinite(tree.step_reward), "what a turn earned is not finite"),
        (tree.sampled_prompt >= 0, "a negative token id in the prompt that was sampled from"),
        (
            (tree.guide > 0) == tree.guided,
            "actions of a guide without a prompt that tells them, or one without",
        ),
    ):
        _require(ok, tree, defect)
    if tree.rescored:
        known = np.isfinite(tree.closed_logprob)
        _require(known == (tree.closed_version >= 0), tree, "scores at the close and their versions disagree")
        _require(sampled[known], tree, "a score at the close of a token that was not sampled")
    if tree.taught:
        unknown = np.isnan(tree.teacher_logprob)
        _require(sampled | unknown, tree, "a teacher's score of a token that was not sampled")
        _require(unknown | np.isfinite(tree.teacher_logprob), tree, "an infinite score by the teacher")
    if tree.routed:
        _require(len(tree.routes) == tree.n_tokens, tree, f"routes of {len(tree.routes)} tokens")
        defect = route_defect(tree.routes)
        _require(not defect, tree, defect)
    if tree.answer_logprob.size:
        unknown = np.isnan(tree.answer_logprob)
        _require(unknown | (tree.kind != Kind.MODEL), tree, "an answer scored behind a MODEL node")
        _require(unknown | np.isfinite(tree.answer_logprob), tree, "an infinite score of an answer")
    for name in ("opened_s", "first_s", "last_s"):
        _require(~np.isinf(getattr(tree, name)), tree, f"{name} is infinite")
    for record in (*tree.calls, *tree.forks):
        _require(0 <= record.node < tree.n_nodes, tree, f"{type(record).__name__} names node {record.node}")


def _check_arrays(tree: Tree) -> None:
    sizes: dict[str, int] = dict.fromkeys(("tokens", "logprob", "entropy", "version"), tree.n_tokens)
    sizes |= dict.fromkeys(("closed_logprob", "closed_version"), tree.n_tokens if tree.rescored else 0)
    sizes["teacher_logprob"] = tree.n_tokens if tree.taught else 0
    sizes |= dict.fromkeys(("start", "parent", "kind"), tree.n_nodes)
    sizes["answer_logprob"] = tree.n_nodes if tree.answer_logprob.size else 0
    sizes["step_reward"] = tree.n_nodes if tree.step_reward.size else 0
    sizes |= dict.fromkeys(("opened_s", "first_s", "last_s"), tree.n_nodes if tree.timed else 0)
    sizes["sampled_prompt"] = tree.sampled_prompt.size  # any
    sizes["episode"] = tree.n_leaves if tree.episode.size else 0
    for name, dtype in ARRAYS.items():
        array, shape = getattr(tree, name), (sizes.get(name, tree.n_leaves),)
        if array.dtype != dtype:
            raise _defect(tree, f"{name} is {array.dtype}, not {np.dtype(dtype)}")
        if array.shape != shape:
            raise _defect(tree, f"{name} has shape {array.shape}, not {shape}")


def _check_nodes(tree: Tree) -> None:
    _require(tree.n_nodes > 0, tree, "it has no nodes")
    _require(tree.start[0] == 0, tree, "its first node does not start at token 0")
    _require(np.diff(tree.start, append=tree.n_tokens) > 0, tree, "an empty node")
    _require(tree.parent[0] == -1, tree, "its first node is not a root")
    _require(tree.kind[0] == Kind.PROMPT, tree, "its root is not a PROMPT")
    _require(_BELOW_ROOT.issuperset(tree.kind[1:].tolist()), tree, "a node below the root of no known kind")
    parent, node = tree.parent[1:], np.arange(1, tree.n_nodes, dtype=np.int32)
    _require((parent >= 0) & (parent < node), tree, "a node that does not come after its parent")
    # A subtree of n nodes ends n behind its head.  Pre-order iff each ends within its parent's: then the
    # n descendants of a node lie in the n places from it on.
    end = subtree_end(tree)
    _require(end[1:] <= end[parent], tree, "nodes out of depth-first pre-order")


def _check_leaves(tree: Tree) -> None:
    _require((tree.leaf >= 0) & (tree.leaf < tree.n_nodes), tree, "a leaf that names no node")
    bare = np.ones(tree.n_nodes, np.bool_)
    bare[tree.parent[1:]] = bare[tree.leaf] = False
    first = np.flatnonzero(bare)[:1]
    _require(~bare, tree, f"node {first} ends a branch, but no leaf says why it ended")
    _require(_OUTCOMES.issuperset(tree.outcome.tolist()), tree, "an unknown outcome")
    _require(_ORIGINS.issuperset(tree.origin.tolist()), tree, "an unknown origin")
    _require(~np.isinf(tree.reward), tree, "an infinite reward")
    _require((tree.correct >= -1) & (tree.correct <= 1), tree, "`correct` outside -1, 0, 1")
    agree = (tree.correct >= 0) == np.isfinite(tree.reward)
    _require(agree, tree, "`correct` and reward disagree on which leaves are scored")
    if tree.episode.size:
        numbers, first, of = np.unique(tree.episode, return_index=True, return_inverse=True)
        _require(numbers == np.arange(numbers.size), tree, "its episodes are not numbered from 0 on")
        for name in ("reward", "correct", "outcome", "origin"):
            values = getattr(tree, name)
            same = np.array_equal(values[first][of], values, equal_nan=name == "reward")
            _require(same, tree, f"leaves of one episode have not the same {name}")


def _require(ok: bool | np.bool_ | NDArray[np.bool_], tree: Tree, defect: str) -> None:
    """``defect`` is what the tree has unless ``ok``, or all of it, holds."""
    if not (ok.all() if isinstance(ok, np.ndarray) else ok):
        raise _defect(tree, defect)


def _defect(tree: Tree, what: str) -> TreeError:
    return TreeError(f"tree of prompt {tree.prompt_id!r}: {what}")
