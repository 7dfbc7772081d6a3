"""A closed tree without its tokens: its structure and its numbers, computed once, where it closes.

It travels with a reference to the tree: metrics, credit and planning read it, and only a learner rank that
trains on the tree reads the tree itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from system.text import one_line
from system.tree.record import (
    Float32,
    Float64,
    Int8,
    Int32,
    Int64,
    Kind,
    Mishap,
    Origin,
    Outcome,
    ToolCall,
    Tree,
    leaf_sum,
    path,
    path_sum,
    subtree_sum,
)

_Number = TypeVar("_Number", np.int64, np.float64)
_SCORED = np.array([outcome for outcome in Outcome if outcome.scored], np.int8)


@dataclass(frozen=True, slots=True)
class TreeStats:
    """A tree with J nodes in depth-first pre-order, L leaves, C of them judged, and D branching decisions.

    Where the record has episodes, a leaf here is one of these, with M >= L chains of nodes in all: what is
    said of its path is said of the nodes of all its chains, each once.
    """

    prompt_id: str
    task: str
    parent: Int32  # [J] parent node, -1 for the root
    kind: Int8  # [J] a ``Kind``
    length: Int64  # [J] tokens
    logprob: Float64  # [J] sum of the behaviour log-probabilities of the node's tokens, nats; 0 unless MODEL
    entropy_sum: Float64  # [J] sum of the entropies known of its tokens, nats; NaN without any
    entropy_square_sum: Float64  # [J] of their squares; 0 without any
    entropy_known: Int64  # [J] how many are
    answer: Float64  # [J] the record's ``answer_logprob``; NaN throughout where no answers were scored
    leaf: Int32  # [L] the node each leaf ends at; of an episode, its last chain
    reward: Float32  # [L] score; NaN when the leaf was not scored
    outcome: Int8  # [L] an ``Outcome``
    calls: tuple[ToolCall, ...]  # without their arguments
    mishaps: tuple[Mishap, ...]
    nodes: int
    depth: int  # nodes on the longest root-to-leaf path
    leaves: int
    roots: int
    forks: int
    top_ups: int
    unasked: int  # forks at results at which the policy asked for none (``rollout.schedule=eager``)
    correct: NDArray[np.bool_]  # [C] of leaves whose answer was judged
    response_tokens: Int64  # [L] MODEL tokens on each leaf's path: |o| of the GRPO family
    calls_per_leaf: Int64  # [L] tool calls on each leaf's path
    generated: int  # MODEL tokens, each once
    trainable: int  # MODEL tokens with a reward below, each once: what can carry a gradient
    unique: int  # tokens of any kind with a reward below, each once: what a packed forward pass computes
    flat: int  # the same tokens once per leaf with a reward: what flattened paths would compute
    entropy: float  # mean over MODEL tokens, nats; NaN when unknown
    delta_h: Float64  # [D] ΔH of each decision
    probability: Float64  # [D] fork probability of each decision
    forked: NDArray[np.bool_]  # [D] whether the decision started a branch that the policy asked for
    version_min: int  # oldest and newest weight version among MODEL tokens; -1 without any
    version_max: int
    seconds: float  # from the first root to the close
    rescored: int  # MODEL tokens that were scored when their nodes closed
    rescored_gap: float  # sum over these of |log-probability then - when sampled|, nats
    step_reward: Float64  # [J] the record's; 0 throughout where no environment gave any
    parts: Mapping[str, Float32] = field(default_factory=dict[str, Float32])
    # [L] by name: those numbers of the rewards that are metrics; NaN where one is not known
    guide: int = 0  # actions of a demonstration that the prompt told which it was sampled from
    answers: tuple[str | None, ...] = ()  # [L] the record's ``answers``: final answers; empty where unknown
    # [L] seconds after the tree's start between which a leaf was scored; None where that is not known
    scoring: tuple[tuple[float, float] | None, ...] = ()
    # [M] the node each chain ends at, and the episode, a leaf here, it is of; empty where each has one chain
    ends: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))
    owner: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))

    @property
    def after_expert(self) -> NDArray[np.bool_]:
        """[L] whether a leaf's path begins with turns of an expert."""
        return self.along((self.kind == Kind.EXPERT).astype(np.int64)) > 0

    @classmethod
    def of(cls, tree: Tree) -> TreeStats:
        return cls._of_leaves(tree) if not tree.episode.size else cls._of_episodes(tree)

    @classmethod
    def _of_episodes(cls, tree: Tree) -> TreeStats:
        """Those of the leaves, made into those of the episodes."""
        chains = cls._of_leaves(tree)
        first = np.unique(tree.episode, return_index=True)[1]
        last = tree.n_leaves - 1 - np.unique(tree.episode[::-1], return_index=True)[1]
        order = np.argsort(tree.episode, kind="stable")  # an episode's chains one after the other
        several = first.size < tree.n_leaves
        origins = Counter(tree.origin[first].tolist())
        judged = tree.correct[first]
        stats = replace(
            chains,
            leaf=tree.leaf[last],
            reward=tree.reward[first],
            outcome=tree.outcome[first],
            leaves=first.size,
            roots=origins[Origin.ROOT],
            forks=origins[Origin.FORK],
            top_ups=origins[Origin.TOP_UP],
            correct=judged[judged >= 0] == 1,
            ends=tree.leaf[order] if several else np.zeros(0, np.int32),
            owner=tree.episode[order] if several else np.zeros(0, np.int32),
        )
        calls = np.bincount([call.node for call in tree.calls], minlength=tree.n_nodes).astype(np.int64)
        sampled = np.where(stats.kind == Kind.MODEL, stats.length, 0)
        return replace(stats, response_tokens=stats.along(sampled), calls_per_leaf=stats.along(calls))

    @classmethod
    def _of_leaves(cls, tree: Tree) -> TreeStats:
        length = np.diff(tree.start, append=tree.n_tokens).astype(np.int64)
        model = tree.kind == Kind.MODEL
        rewarded = np.isfinite(tree.reward)
        below = leaf_sum(tree.parent, tree.leaf, rewarded).astype(np.int64)
        call_nodes = np.array([call.node for call in tree.calls], dtype=np.int64)
        calls = path_sum(tree.parent, np.bincount(call_nodes, minlength=tree.n_nodes).astype(np.int64))
        depth = path_sum(tree.parent, np.ones(tree.n_nodes, dtype=np.int64))
        sampled = np.repeat(model, length)
        known = np.isfinite(tree.entropy)
        entropy = tree.entropy[sampled & known]
        version = tree.version[sampled]
        h = np.where(known, tree.entropy, 0.0).astype(np.float64)
        at_close = np.isfinite(tree.closed_logprob)
        gap = np.abs(tree.closed_logprob - tree.logprob)[at_close] if tree.rescored else np.zeros(0)
        known_of_node = np.add.reduceat(known, tree.start, dtype=np.int64)
        return cls(
            prompt_id=tree.prompt_id,
            task=tree.task,
            parent=tree.parent,
            kind=tree.kind,
            length=length,
            logprob=np.add.reduceat(tree.logprob, tree.start, dtype=np.float64),
            entropy_sum=np.where(known_of_node > 0, np.add.reduceat(h, tree.start), np.nan),
            entropy_square_sum=np.add.reduceat(h**2, tree.start),
            entropy_known=known_of_node,
            answer=np.where(~model, tree.answer_logprob, np.nan)
            if tree.answer_logprob.size
            else np.full(tree.n_nodes, np.nan),
            leaf=tree.leaf,
            reward=tree.reward,
            outcome=tree.outcome,
            calls=tuple(replace(call, arguments={}) for call in tree.calls),
            mishaps=tuple(Mishap(*map(one_line, one)) for one in tree.meta.get("mishaps", ())),
            nodes=tree.n_nodes,
            depth=int(depth[tree.leaf].max(initial=0)),
            leaves=tree.n_leaves,
            roots=tree.origins(Origin.ROOT),
            forks=tree.origins(Origin.FORK),
            top_ups=tree.origins(Origin.TOP_UP),
            unasked=sum(fork.forks for fork in tree.forks if fork.forks == fork.scheduled),
            correct=tree.correct[tree.correct >= 0] == 1,
            response_tokens=path_sum(tree.parent, length * model)[tree.leaf],
            calls_per_leaf=calls[tree.leaf],
            generated=int(length[model].sum()),
            trainable=int(length[model & (below > 0)].sum()),
            unique=int(length[below > 0].sum()),
            flat=int((length * below).sum()),
            entropy=float(entropy.mean(dtype=np.float64)) if entropy.size else float("nan"),
            delta_h=np.array([fork.delta_h for fork in tree.forks], dtype=np.float64),
            probability=np.array([fork.probability for fork in tree.forks], dtype=np.float64),
            forked=np.array([fork.forks > fork.scheduled for fork in tree.forks], dtype=np.bool_),
            version_min=int(version.min(initial=np.iinfo(np.int32).max)) if version.size else -1,
            version_max=int(version.max(initial=-1)),
            seconds=max(0.0, tree.closed_s - tree.started_s),
            rescored=int(at_close.sum()),
            rescored_gap=float(gap.sum(dtype=np.float64)),
            parts=_parts(tree),
            guide=tree.guide,
            answers=tuple(tree.meta.get("answers", ())),
            scoring=tuple(one and (one[0], one[1]) for one in tree.meta.get("scored_s", ())),
            step_reward=tree.step_reward.astype(np.float64)
            if tree.step_reward.size
            else np.zeros(tree.n_nodes),
        )

    @property
    def rewards(self) -> Float32:
        """The rewards that were given, in leaf order."""
        return self.reward[np.isfinite(self.reward)]

    @property
    def outcomes(self) -> Counter[str]:
        """Leaves by lower-case ``Outcome`` name."""
        return Counter(Outcome(int(code)).name.lower() for code in self.outcome)

    @property
    def zero_variance(self) -> bool:
        """All leaves with a reward earned the same: group-relative credit has nothing to teach here."""
        return self.rewards.size == 0 or float(np.ptp(self.rewards)) < 1e-6

    @property
    def failed(self) -> int:
        """Leaves that no score came for, though they would have counted."""
        return int((~np.isfinite(self.reward) & np.isin(self.outcome, _SCORED)).sum())

    # For credits

    @property
    def scored(self) -> NDArray[np.bool_]:
        """[L] leaves that may teach: they have a reward, and an outcome that counts (``Outcome.scored``).

        The others have weight 0 whatever their credit.
        """
        return np.isfinite(self.reward) & np.isin(self.outcome, _SCORED)

    @property
    def scored_below(self) -> Int64:
        """[J] scored leaves at or below each node."""
        return self.sum_below(self.scored).astype(np.int64)

    @property
    def mean_reward_below(self) -> Float64:
        """[J] mean reward of the scored leaves at or below each node; NaN without any."""
        total = self.sum_below(np.where(self.scored, self.reward, 0.0))
        with np.errstate(invalid="ignore"):
            return total / self.scored_below

    @property
    def on_path(self) -> NDArray[np.bool_]:
        """[L, J] whether a node lies on the path to a leaf."""
        if not self.ends.size:
            return leaf_sum(self.parent, self.leaf, np.eye(self.leaves)).T > 0
        at_node = np.zeros((self.nodes, self.leaves), np.int64)
        at_node[self.ends, self.owner] = 1
        return subtree_sum(self.parent, at_node).T > 0

    def path(self, leaf: int) -> Int64:
        """Nodes from the root to leaf number ``leaf``, in order."""
        if not self.ends.size:
            return path(self.parent, int(self.leaf[leaf]))
        return np.flatnonzero(self.on_path[leaf])

    def chains(self) -> list[tuple[int, int]]:
        """[M] (the node that a chain ends at, its leaf), those of a leaf one after the other."""
        if not self.ends.size:
            return [(node, leaf) for leaf, node in enumerate(self.leaf.tolist())]
        return list(zip(self.ends.tolist(), self.owner.tolist(), strict=True))

    def sum_below(self, values: NDArray[Any]) -> Float64:
        """[J, ...] sum of finite ``values`` [L, ...] over the leaves at or below each node, each once."""
        if not self.ends.size:
            return leaf_sum(self.parent, self.leaf, values)
        return np.tensordot(self.on_path.astype(np.float64), values, axes=(0, 0))

    def along(self, values: NDArray[_Number]) -> NDArray[_Number]:
        """[L] sum of ``values`` [J] over the nodes of each leaf's path, each once."""
        if not self.ends.size:
            return path_sum(self.parent, values)[self.leaf]
        return np.where(self.on_path, values, 0).sum(axis=1)


def _parts(tree: Tree) -> dict[str, Float32]:
    """The record's parts by name, of those that it says are measured: of its episodes, if it has such."""
    leaves = [one or {} for one in tree.meta.get("parts", ())]
    if len(leaves) != (np.unique(tree.episode).size or tree.n_leaves):
        return {}
    return {
        name: np.array([one.get(name, np.nan) for one in leaves], np.float32)
        for name in tree.meta.get("measured", ())
        if any(name in one for one in leaves)
    }
