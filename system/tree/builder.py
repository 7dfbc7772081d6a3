"""The buffer a tree grows in: append-only, filled by one rollout while many branches grow, then closed into
a Tree.

Nodes are named by handles, integers in creation order (0 is the prompt).  Nothing is moved while the tree
grows; ``close`` sorts the nodes into depth-first pre-order once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from system.tree.node import GrowingLeaf, GrowingNode, node_arrays, pieces_of, token_arrays
from system.tree.record import (
    ForkDecision,
    Int32,
    Kind,
    Origin,
    Outcome,
    ToolCall,
    Tree,
    TreeError,
    validate,
)
from system.tree.routes import Routes, recorded
from system.tree.token_path import TokenPath
from system.tree.values import plain, row, unsampled


class TreeBuilder:
    """A tree that still grows.

    Appending a chunk costs amortised O(chunk); the tokens of a branch's next request cost nothing (a view),
    after one copy of the prefix per fork.  All methods raise :class:`TreeError` for a use that would break
    the tree. Not thread-safe: it belongs to one rollout, whose branches are tasks of one event loop.
    """

    def __init__(
        self,
        prompt_id: str,
        task: str,
        prompt_tokens: Sequence[int] | NDArray[Any],
        budget: int,
        meta: dict[str, Any] | None = None,
        started_s: float = 0.0,
        guide: int = 0,
        sampled_prompt: Sequence[int] | NDArray[Any] = (),
        clock: Callable[[], float] | None = None,
    ) -> None:
        """``budget``: the leaf budget n.  ``started_s``: unix time, stored in the tree.  ``clock``: tells it,
        so that the tree says when its nodes grew; None: it does not.

        ``sampled_prompt``: the prompt that the branches go on from, where that is not ``prompt_tokens``, the
        one that the tree is trained under; it tells ``guide`` actions.  While the tree grows, the former is
        its root (in paths and depths); the closed tree has the latter there.
        """
        trained, sampled = (np.array(one, np.int32) for one in (prompt_tokens, sampled_prompt))
        if trained.ndim != 1 or trained.size == 0:
            raise TreeError(f"prompt {prompt_id!r} has no tokens")
        tokens = sampled if sampled.size else trained
        self.prompt_id, self.budget = prompt_id, budget
        self.meta: dict[str, Any] = dict(meta or {})
        self.guide, self._trained, self._sampled = guide, trained, sampled
        self._clock = clock
        self._about: dict[str, Any] = {
            "prompt_id": prompt_id,
            "task": task,
            "budget": budget,
            "started_s": started_s,
        }
        root = GrowingNode(parent=-1, kind=Kind.PROMPT, path=TokenPath(tokens), begin=0, end=int(tokens.size))
        self._nodes = [root]
        self._leaves: list[GrowingLeaf] = []
        self._calls: list[ToolCall] = []
        self._forks: list[ForkDecision] = []
        self._annotate(root, int(tokens.size), None, None, None)

    @property
    def started_s(self) -> float:
        """Unix time."""
        return self._about["started_s"]

    @property
    def prompt(self) -> int:
        """Handle of the PROMPT node."""
        return 0

    def n_tokens(self, node: int) -> int:
        """Own tokens of ``node`` so far."""
        return self._node(node).end - self._node(node).begin

    def depth(self, node: int) -> int:
        """Tokens from the root to the end of ``node``, prompt included."""
        return self._node(node).end

    def node(self, parent: int, kind: Kind, at: int | None = None) -> int:
        """Open a child of ``parent``, which then grows no more.  A child left empty is dropped at close.

        ``at``: the depth at which it begins, for a MODEL node that goes on from inside another one, after
        its first token and before its end; None: ``parent``'s end.  The close cuts ``parent`` there.
        """
        above = self._node(parent)
        if kind == Kind.PROMPT:
            raise TreeError("a tree has one PROMPT node, its root")
        begin = above.end if at is None else at
        if begin != above.end and not (kind == above.kind == Kind.MODEL and above.begin < begin < above.end):
            raise TreeError(f"node {parent}: a child cannot begin at {at}; only MODEL goes on inside MODEL")
        above.children.append(len(self._nodes))
        own = GrowingNode(parent=parent, kind=kind, path=above.path, begin=begin, end=begin)
        own.times = (self._since_s(), math.nan, math.nan)
        self._nodes.append(own)
        return len(self._nodes) - 1

    def extend(
        self,
        node: int,
        tokens: ArrayLike,
        logprob: ArrayLike | None = None,
        entropy: ArrayLike | None = None,
        version: ArrayLike | None = None,
    ) -> None:
        """Append a chunk [k] to ``node``.

        A MODEL node needs ``logprob`` and ``version`` ([k], or one value for the whole chunk); ``entropy``
        may be unknown.  Other nodes take tokens only.
        """
        own = self._node(node)
        if own.children or own.leaves:
            raise TreeError(
                f"node {node} has {'children' if own.children else 'a leaf'}: it can no longer grow"
            )
        if own.kind == Kind.PROMPT:
            raise TreeError("the prompt is given once, at the start")
        if own.kind == Kind.MODEL and (logprob is None or version is None):
            raise TreeError("sampled tokens need their log-probabilities and weight versions")
        if own.kind != Kind.MODEL and not (logprob is None and entropy is None and version is None):
            raise TreeError(
                f"{own.kind.name} tokens were not sampled: they carry neither log-probability nor version"
            )
        ids = np.asarray(tokens, np.int32)
        if ids.ndim != 1:
            raise TreeError(f"a chunk is a vector of token ids, not an array of shape {ids.shape}")
        if ids.size == 0:
            return
        self._annotate(own, ids.size, logprob, entropy, version)
        if own.path.size != own.end:  # a sibling has gone on from here: this branch needs its own copy
            own.path = TokenPath(own.path.view(0, own.end))
        own.path.append(ids)
        own.grew(self._since_s())
        own.end += int(ids.size)

    def path_tokens(self, node: int) -> Int32:
        """[P] token ids from the root to the end of ``node``: a read-only view, stable for ever."""
        own = self._node(node)
        return own.path.view(0, own.end)

    def leaf(self, node: int, outcome: Outcome, origin: Origin, episode: int = -1) -> int:
        """Declare that a branch ended at ``node``, and why; returns the leaf's index in the Tree.

        ``episode``: the run of an agent that it is of; of all leaves of a tree, or of none.
        """
        self._node(node).leaves += 1
        self._leaves.append(GrowingLeaf(node, Outcome(outcome), Origin(origin), episode))
        return len(self._leaves) - 1

    def score(self, leaf: int, value: float, correct: bool) -> None:
        """Give leaf number ``leaf`` its reward; a leaf never scored has reward NaN and ``correct`` -1."""
        if not math.isfinite(value):
            raise TreeError(f"leaf {leaf}: a reward must be finite, not {value}")
        self._leaves[leaf].reward = float(value)
        self._leaves[leaf].correct = int(correct)

    def rescore(self, node: int, logprob: ArrayLike, version: int) -> None:
        """Give MODEL node ``node``, which grows no more, the log-probabilities [n] of its own tokens under
        weights ``version``.
        """
        if self.kind(node) != Kind.MODEL:
            raise TreeError(f"node {node}: only sampled tokens are scored at their close")
        own = self._node(node)
        own.closed = row(logprob, own.end - own.begin, np.float32, "logprob"), version

    def teach(self, node: int, logprob: ArrayLike) -> None:
        """Give MODEL node ``node``, which grows no more, its [n] log-probabilities by the teacher."""
        if self.kind(node) != Kind.MODEL:
            raise TreeError(f"node {node}: a teacher scores only sampled tokens")
        own = self._node(node)
        own.teacher = row(logprob, own.end - own.begin, np.float32, "logprob")

    def untaught(self) -> list[int]:
        """Handles of the MODEL nodes with tokens that no teacher has scored."""
        return [
            handle
            for handle, node in enumerate(self._nodes)
            if node.kind == Kind.MODEL and node.end > node.begin and node.teacher is None
        ]

    def route(self, node: int, first: int, routes: Routes) -> None:
        """Record the experts that tokens on the way to the end of ``node`` went through: those of numbers
        ``first``, ``first`` + 1, …, counted from the root.  What is recorded already stays.
        """
        own = self._node(node)
        end, stop = own.end, first + len(routes)
        if not 0 <= first <= stop <= end:
            raise TreeError(f"node {node}: routes of tokens {first} to {stop} on a path of {end}")
        while end > first:
            low, high = max(own.begin, first), min(end, stop)
            if low < high:
                own.route(low, routes[low - first : high - first])
            end = own.begin
            if own.parent < 0:
                break
            own = self._node(own.parent)

    def unrouted(self, node: int) -> int:
        """Number, from the root, of the first token on the way to the end of ``node`` whose experts are not
        recorded; its depth if there is none.
        """
        path = [self._node(one) for one in self.path(node)]
        ends = [*(below.begin for below in path[1:]), path[-1].end]
        return next(
            (first for own, end in zip(path, ends, strict=True) if (first := own.unrouted()) < end), ends[-1]
        )

    def answer(self, node: int, logprob: float) -> None:
        """Give PROMPT or TOOL node ``node`` the mean log-probability of the gold answer behind it."""
        self._node(node).answer = logprob

    def reward(self, node: int, value: float) -> None:
        """Give ``node`` what its turn earned by itself, in the sight of an environment."""
        if not math.isfinite(value):
            raise TreeError(f"node {node}: a reward must be finite, not {value}")
        self._node(node).reward += float(value)

    def rewards(self, node: int) -> tuple[float, ...]:
        """What the turns from the root to ``node`` earned, without those that earned nothing."""
        return tuple(value for one in self.path(node) if (value := self._node(one).reward))

    def call(self, call: ToolCall) -> None:
        """Record a tool call; ``call.node`` is a handle."""
        self._node(call.node)
        self._calls.append(call)

    def fork(self, decision: ForkDecision) -> None:
        """Record a branching decision; ``decision.node`` is a handle."""
        self._node(decision.node)
        self._forks.append(decision)

    def close(self, now: float) -> Tree:
        """The tree as it stands, at unix time ``now``; raises :class:`TreeError` when a branch has no leaf.

        Nodes move into depth-first pre-order, siblings in creation order.  An empty node is dropped: what
        named it (children, leaves, calls, forks) then names its nearest non-empty ancestor.  A node that
        others go on from inside becomes several, one after the other: what named it names the last.  The
        growth stays usable.
        """
        pieces, index = pieces_of(self._nodes)
        lengths = np.array([piece.end - piece.begin for piece in pieces], np.int32)
        answers = np.array([self._nodes[piece.handle].answer for piece in pieces], np.float32)  # never cut
        earned = np.zeros(len(pieces), np.float32)
        for handle, node in enumerate(self._nodes):
            earned[index[handle]] += node.reward
        episodes = np.array([leaf.episode for leaf in self._leaves], np.int32)
        lengths[0] = self._trained.size
        grown = token_arrays([self._nodes[handle] for handle in dict.fromkeys(p.handle for p in pieces)])
        tree = Tree(
            **self._about,
            **self._under_trained(grown),
            **node_arrays(self._nodes, pieces),
            start=(np.cumsum(lengths) - lengths).astype(np.int32),
            leaf=np.array([index[x.node] for x in self._leaves], np.int32),
            reward=np.array([x.reward for x in self._leaves], np.float32),
            correct=np.array([x.correct for x in self._leaves], np.int8),
            outcome=np.array([x.outcome for x in self._leaves], np.int8),
            origin=np.array([x.origin for x in self._leaves], np.int8),
            calls=tuple(replace(c, node=index[c.node]) for c in self._calls),
            forks=tuple(replace(f, node=index[f.node]) for f in self._forks),
            closed_s=now,
            answer_logprob=answers if np.isfinite(answers).any() else np.zeros(0, np.float32),
            step_reward=earned if earned.any() else np.zeros(0, np.float32),
            meta=plain(self.meta, f"tree of prompt {self.prompt_id!r}: meta"),
            sampled_prompt=self._sampled,
            guide=self.guide,
            episode=episodes if (episodes >= 0).any() else np.zeros(0, np.int32),
        )
        validate(tree)
        return tree

    def _under_trained(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """The arrays [T] of the tokens with the prompt that is trained under in place of the sampled one."""
        if not self._sampled.size:
            return arrays
        begin = self._nodes[0].end
        return arrays | {
            name: np.concatenate([unsampled(name, self._trained, array), array[begin:]])
            for name, array in arrays.items()
        }

    def kind(self, node: int) -> Kind:
        return self._node(node).kind

    def entropies(self, node: int) -> NDArray[np.float32]:
        """[n] of ``node``'s own tokens so far, NaN where unknown."""
        return np.concatenate([np.zeros(0, np.float32), *self._node(node).entropy])

    def logprobs(self, node: int) -> NDArray[np.float32]:
        """[n] of ``node``'s own tokens so far, nats; 0 where they were not sampled."""
        return np.concatenate([np.zeros(0, np.float32), *self._node(node).logprob])

    def tokens(self, node: int) -> Int32:
        """[n] ``node``'s own tokens so far: a read-only view."""
        own = self._node(node)
        return own.path.view(own.begin, own.end)

    def children(self, node: int) -> tuple[int, ...]:
        """Handles of its children, oldest first."""
        return tuple(self._node(node).children)

    def turn(self, node: int) -> int:
        """Depth at which the turn begins that MODEL node ``node`` is, or goes on from inside."""
        own = self._node(node)
        while (above := self._node(own.parent)).kind == Kind.MODEL:
            own = above
        return own.begin

    def path(self, node: int) -> list[int]:
        """Handles from the root to ``node``."""
        found = [node]
        while (parent := self._node(found[-1]).parent) >= 0:
            found.append(parent)
        return found[::-1]

    def surprise(self, node: int) -> float:
        """-mean log-probability of the tokens of MODEL node ``node`` so far, nats; 0 without any."""
        tokens = self.n_tokens(node)
        return -sum(float(one.sum(dtype=np.float64)) for one in self._node(node).logprob) / max(tokens, 1)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """(arrays, JSON-able fields), from which :meth:`restore` makes an equal growth.

        Arrays per token (those of the same names in a :class:`Tree`) and per node (``parent``, ``kind``,
        ``begin``, ``length``, ``answer``, ``reward``, ``times``), nodes in the order of their handles; of a
        guided tree also the ``trained_prompt``.  The leaves' rewards are not in it: they come at the close.
        """
        nodes = self._nodes
        arrays: dict[str, NDArray[Any]] = {
            **token_arrays(nodes),
            "parent": np.array([n.parent for n in nodes], np.int32),
            "kind": np.array([n.kind for n in nodes], np.int8),
            "begin": np.array([n.begin for n in nodes], np.int32),
            "length": np.array([n.end - n.begin for n in nodes], np.int32),
            "answer": np.array([n.answer for n in nodes], np.float32),
            "reward": np.array([n.reward for n in nodes], np.float64),
            "times": np.array([n.times for n in nodes], np.float64),
        }
        fields = {
            **self._about,
            "meta": self.meta,
            "leaves": [[x.node, int(x.outcome), int(x.origin), x.episode] for x in self._leaves],
            "calls": [asdict(call) for call in self._calls],
            "forks": [asdict(fork) for fork in self._forks],
        }
        if self._sampled.size:
            arrays["trained_prompt"], fields["guide"] = self._trained, self.guide
        return arrays, fields

    @classmethod
    def restore(
        cls,
        arrays: Mapping[str, NDArray[Any]],
        fields: Mapping[str, Any],
        clock: Callable[[], float] | None = None,
    ) -> TreeBuilder:
        """The inverse of :meth:`state`.  Raises :class:`TreeError` or ``KeyError`` for what is none."""
        ends = np.cumsum(arrays["length"])
        about = {name: fields[name] for name in ("prompt_id", "task", "budget", "started_s", "meta")}
        root = arrays["tokens"][: ends[0]]
        trained, sampled = (arrays["trained_prompt"], root) if "trained_prompt" in arrays else (root, ())
        guide: int = fields.get("guide", 0)
        none = np.full(ends[-1], np.nan, np.float32)
        growth = cls(prompt_tokens=trained, sampled_prompt=sampled, guide=guide, **about)
        nodes = (arrays[name][1:].tolist() for name in ("parent", "kind", "begin"))
        for start, end, parent, kind, begin in zip(ends[:-1], ends[1:], *nodes, strict=True):
            node, own = growth.node(parent, Kind(kind), begin), slice(start, end)
            sampled = {name: arrays[name][own] for name in ("logprob", "entropy", "version")}
            growth.extend(node, arrays["tokens"][own], **(sampled if kind == Kind.MODEL else {}))
            if "closed_version" in arrays and (version := arrays["closed_version"][own]).max(initial=-1) >= 0:
                growth.rescore(node, arrays["closed_logprob"][own], int(version[0]))
            taught = arrays.get("teacher_logprob", none)[own]
            if kind == Kind.MODEL and taught.size and np.isfinite(taught).all():
                growth.teach(node, taught)
            if "routes" in arrays and recorded(arrays["routes"][own]).any():
                growth._node(node).route(begin, arrays["routes"][own])
        if "routes" in arrays and recorded(arrays["routes"][: ends[0]]).any():
            growth._node(growth.prompt).route(0, arrays["routes"][: ends[0]])
        for number, logprob in enumerate(arrays.get("answer", np.zeros(0)).tolist()):
            growth.answer(number, logprob)
        for number, value in enumerate(arrays["reward"].tolist()):
            growth.reward(number, value)
        # A state of an older version has no times.
        times = arrays.get("times", np.zeros((0, 3))).tolist()
        for node, (opened, first, last) in zip(growth._nodes, times, strict=False):
            node.times = (opened, first, last)
        growth._clock = clock
        for leaf in fields["leaves"]:
            growth.leaf(*leaf)
        for call in fields["calls"]:
            growth.call(ToolCall(**call))
        for fork in fields["forks"]:
            growth.fork(ForkDecision(**fork))
        return growth

    def _node(self, handle: int) -> GrowingNode:
        if not 0 <= handle < len(self._nodes):
            raise TreeError(f"no node {handle}: the growth has {len(self._nodes)} nodes")
        return self._nodes[handle]

    def _since_s(self) -> float:
        """Seconds since the tree's start; NaN without a clock."""
        return math.nan if self._clock is None else max(0.0, self._clock() - self.started_s)

    def _annotate(
        self,
        node: GrowingNode,
        size: int,
        logprob: ArrayLike | None,
        entropy: ArrayLike | None,
        version: ArrayLike | None,
    ) -> None:
        node.logprob.append(row(0.0 if logprob is None else logprob, size, np.float32, "logprob"))
        node.entropy.append(row(np.nan if entropy is None else entropy, size, np.float32, "entropy"))
        node.version.append(row(-1 if version is None else version, size, np.int32, "version"))
