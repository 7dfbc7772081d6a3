"""Random trees for property tests: a TreeBuilder driven at random, beside a naive one of plain lists."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import strategies as st

from system.tree.builder import TreeBuilder
from system.tree.record import ForkDecision, Kind, Origin, Outcome, ToolCall, Tree


@dataclass
class NaiveNode:
    parent: int
    kind: Kind
    tokens: list[int] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    version: list[int] = field(default_factory=list)
    closed: list[tuple[float, int]] = field(default_factory=list)  # score at the close, and its version
    teacher: list[float] = field(default_factory=list)  # its scores; NaN: none
    answer: float = np.nan
    at: int | None = None  # tokens of its parent that come before it; None: all
    times: tuple[float, float, float] = (np.nan, np.nan, np.nan)  # opened, its first token, its last one

    def part(self, parent: int, begin: int, end: int) -> NaiveNode:
        columns = (self.tokens, self.logprob, self.entropy, self.version, self.closed, self.teacher)
        opened, first, last = self.times
        times = (
            np.nan if begin else opened,
            np.nan if begin else first,
            last if end == len(self.tokens) else np.nan,
        )
        own = [column[begin:end] for column in columns]
        return NaiveNode(parent, self.kind, *own, answer=self.answer, times=times)


@dataclass
class Naive:
    """What a tree holds, in creation order, the slow and obvious way."""

    nodes: list[NaiveNode]
    leaves: list[tuple[int, Outcome, Origin, float]] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)  # the prompt sampled from, where it is not the root's
    routes: dict[int, list[list[int]]] = field(default_factory=dict)  # [2, 3] of tokens that have a record

    def children(self, node: int) -> list[int]:
        return [h for h, n in enumerate(self.nodes) if n.parent == node]

    def path_tokens(self, node: int, before: int | None = None) -> list[int]:
        """Of the path to ``node``, and of its own tokens those before ``before``."""
        if node < 0:
            return []
        own = self.nodes[node]
        if node == 0 and self.sampled:
            return self.sampled
        return self.path_tokens(own.parent, own.at) + own.tokens[:before]

    def cut(self) -> tuple[Naive, list[int]]:
        """The same without children that begin inside their parents: these become several, one after the
        other.  Also says what each node's last part is called now.
        """
        parts = Naive([])
        names: list[dict[int, int]] = []  # of each node, the part that ends at so many of its tokens
        for handle, node in enumerate(self.nodes):
            size = len(node.tokens)
            cuts = {n.at for n in self.nodes if n.parent == handle and n.at is not None}
            above = (
                -1
                if node.parent < 0
                else names[node.parent][len(self.nodes[node.parent].tokens) if node.at is None else node.at]
            )
            begin, ends = 0, {}
            for end in sorted({*cuts, size}):
                parts.nodes.append(node.part(above, begin, end))
                above = ends[end] = len(parts.nodes) - 1
                begin = end
            names.append(ends)
        last = [max(ends.values()) for ends in names]
        parts.leaves = [(last[node], *about) for node, *about in self.leaves]
        return parts, last

    def preorder(self, node: int = 0) -> list[int]:
        own = [node] if self.nodes[node].tokens else []
        return own + [h for child in self.children(node) for h in self.preorder(child)]

    def nearest(self, node: int) -> int:
        """The node, or its nearest ancestor with tokens."""
        return node if self.nodes[node].tokens else self.nearest(self.nodes[node].parent)


def grow(seed: int, steps: int, first_token: int = 0) -> tuple[TreeBuilder, Naive]:
    """A random growth.  Every token id is unique, counting from ``first_token``."""
    rng = np.random.default_rng(seed)
    next_token = first_token

    def ids(count: int) -> list[int]:
        nonlocal next_token
        next_token += count
        return list(range(next_token - count, next_token))

    prompt = ids(int(rng.integers(1, 6)))
    blank = len(prompt)
    naive = Naive([NaiveNode(-1, Kind.PROMPT, prompt, [0.0] * blank, [np.nan] * blank, [-1] * blank)])
    if seed % 3 == 0:  # a guided tree, whose other prompt may be shorter, too
        naive.sampled = ids(1 + seed % 8)
    now, timed = 1.0, seed % 4 > 0
    growth = TreeBuilder(
        f"prompt-{seed}",
        "test",
        prompt,
        budget=8,
        meta={"seed": seed},
        started_s=1.0,
        guide=len(naive.sampled),
        sampled_prompt=naive.sampled,
        clock=(lambda: now) if timed else None,
    )
    views: list[tuple[int, list[int], np.ndarray]] = []

    def end(node: int) -> None:
        outcome = Outcome(rng.choice([0, 0, 0, 1, 2, 3, 4, 5]))
        origin = Origin(rng.integers(0, 3))
        number = growth.leaf(node, outcome, origin)
        reward = float(np.float32(rng.choice([rng.normal(), 0.0, 1.0])))
        if rng.random() < 0.8:
            growth.score(number, reward, bool(reward > 0.5))
        else:
            reward = np.nan
        assert number == len(naive.leaves)
        naive.leaves.append((node, outcome, origin, reward))

    def may_grow() -> list[int]:
        closed = {leaf[0] for leaf in naive.leaves} | {n.parent for n in naive.nodes}
        return [h for h in range(1, len(naive.nodes)) if h not in closed]

    for _ in range(steps):
        now += 0.5
        growing = may_grow()
        act = rng.random()
        if growing and act < 0.6:
            node = int(rng.choice(growing))
            own = naive.nodes[node]
            chunk = ids(int(rng.integers(0, 5)))
            if timed and chunk:
                own.times = (own.times[0], own.times[1] if own.tokens else now - 1, now - 1)
            own.tokens += chunk
            if own.kind == Kind.MODEL:
                logprob = -rng.random(len(chunk)).astype(np.float32)
                entropy = rng.random(len(chunk)).astype(np.float32)
                version = rng.integers(0, 9, len(chunk)).astype(np.int32)
                growth.extend(node, chunk, logprob, entropy, version)
                own.logprob += logprob.tolist()
                own.entropy += entropy.tolist()
                own.version += version.tolist()
            else:
                growth.extend(node, chunk)
                own.logprob += [0.0] * len(chunk)
                own.entropy += [np.nan] * len(chunk)
                own.version += [-1] * len(chunk)
            views.append((node, naive.path_tokens(node), growth.path_tokens(node)))
        elif act < 0.9:
            parent = int(rng.integers(0, len(naive.nodes)))
            kind = Kind(rng.choice([Kind.MODEL, Kind.MODEL, Kind.TOOL]))
            if seed % 5 == 0 and kind == Kind.MODEL and len(naive.nodes) % 3 == 0:
                kind = Kind.EXPERT
            above, at = naive.nodes[parent], None
            if kind == above.kind == Kind.MODEL and len(above.tokens) > 1 and rng.random() < 0.5:
                at = int(rng.integers(1, len(above.tokens)))
            begin = None if at is None else growth.depth(parent) - len(above.tokens) + at
            node = growth.node(parent, kind, begin)
            assert node == len(naive.nodes)
            times = (now - 1 if timed else np.nan, np.nan, np.nan)
            naive.nodes.append(NaiveNode(parent, kind, at=at, times=times))
            if kind == Kind.TOOL:
                growth.call(
                    ToolCall(node, "search", {"query": f"q{node}"}, "ok", 0.25, cached=bool(node % 2))
                )
                growth.fork(ForkDecision(node, 0.1, 0.5, float(rng.random()), 1))
        elif growing:
            end(int(rng.choice(growing)))
    parents = {n.parent for n in naive.nodes if n.at is None}  # at whose end something goes on
    for node in range(len(naive.nodes)):
        bare = node not in parents and node not in {leaf[0] for leaf in naive.leaves}
        if bare or rng.random() < 0.15:
            end(node)
    _rescore(growth, naive, np.random.default_rng([seed, 1]))
    _route(growth, naive, np.random.default_rng([seed, 2]))
    for node, expected, view in views:  # what a request was given stays what it was
        assert view.tolist() == expected
        assert growth.path_tokens(node).tolist()[: len(expected)] == expected
    return growth, naive


def _rescore(growth: TreeBuilder, naive: Naive, rng: np.random.Generator) -> None:
    """Of every second tree, score most of the nodes that were sampled, and the answer behind most others;
    of every second one a teacher scores most.
    """
    some, teaches = rng.random(2) < 0.5
    for number, node in enumerate(naive.nodes):
        node.closed = [(np.nan, -1)] * len(node.tokens)
        if some and node.kind == Kind.MODEL and rng.random() < 0.7:
            logprob, version = -rng.random(len(node.tokens)).astype(np.float32), int(rng.integers(0, 9))
            growth.rescore(number, logprob, version)
            node.closed = [(value, version) for value in logprob.tolist()]
        node.teacher = [np.nan] * len(node.tokens)
        if teaches and node.kind == Kind.MODEL and rng.random() < 0.7:
            scores = -rng.random(len(node.tokens)).astype(np.float32)
            growth.teach(number, scores)
            node.teacher = scores.tolist()
        if some and node.kind != Kind.MODEL and rng.random() < 0.7:
            node.answer = float(np.float32(-rng.random()))
            growth.answer(number, node.answer)


def _route(growth: TreeBuilder, naive: Naive, rng: np.random.Generator) -> None:
    """Of two trees in three, record the experts of some stretches of paths; the first record stays."""
    for call in range(int(rng.choice([0, 3, 12]))):
        node = int(rng.integers(0, len(naive.nodes)))
        path = naive.path_tokens(node)
        first, stop = np.sort(rng.integers(0, len(path) + 1, 2)).tolist()
        rows = [[[token % 100, 100 + call, 200], [token % 50, 254, call + 60]] for token in path[first:stop]]
        growth.route(node, first, np.array(rows, np.uint8).reshape(-1, 2, 3))
        for token, row in zip(path[first:stop], rows, strict=True):
            naive.routes.setdefault(token, row)


@st.composite
def growths(draw: st.DrawFn) -> tuple[TreeBuilder, Naive]:
    return grow(draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 40)))


@st.composite
def forests(draw: st.DrawFn, max_trees: int = 4) -> list[Tree]:
    """Several trees whose token ids are all different."""
    count = draw(st.integers(1, max_trees))
    return [
        grow(draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 40)), first_token=10_000 * i)[0].close(2.0)
        for i in range(count)
    ]


def of_episodes(tree: Tree, seed: int) -> Tree:
    """The same tree, its leaves dealt out at random to a few episodes that have one reward each."""
    rng = np.random.default_rng([seed, 2])
    drawn = rng.integers(0, 1 + tree.n_leaves // 2, tree.n_leaves)
    _, first, episode = np.unique(drawn, return_index=True, return_inverse=True)
    shared = {
        name: getattr(tree, name)[first][episode] for name in ("reward", "correct", "outcome", "origin")
    }
    return replace(tree, episode=episode.astype(np.int32), **shared)
