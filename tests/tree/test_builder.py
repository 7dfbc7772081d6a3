from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tree_strategies import Naive, growths

from system.tree.builder import TreeBuilder
from system.tree.record import ARRAYS, Kind, Origin, Outcome, ToolCall, Tree, TreeError


@given(growths())
def test_close_equals_the_naive_reference(case: tuple[TreeBuilder, Naive]) -> None:
    growth, whole = case
    tree = growth.close(now=7.0)
    naive, last = whole.cut()
    order = naive.preorder()
    index = {handle: k for k, handle in enumerate(order)}
    nodes = [naive.nodes[h] for h in order]

    assert tree.tokens.tolist() == [t for n in nodes for t in n.tokens]
    np.testing.assert_array_equal(tree.logprob, np.float32([x for n in nodes for x in n.logprob]))
    np.testing.assert_array_equal(tree.entropy, np.float32([x for n in nodes for x in n.entropy]))
    assert tree.version.tolist() == [x for n in nodes for x in n.version]
    answers = [n.answer for n in nodes]
    if tree.answer_logprob.size:
        np.testing.assert_array_equal(tree.answer_logprob, np.float32(answers))
    else:
        assert np.isnan(answers).all()
    closed = [x for n in nodes for x in n.closed]
    if tree.rescored:
        np.testing.assert_array_equal(tree.closed_logprob, np.float32([score for score, _ in closed]))
        assert tree.closed_version.tolist() == [version for _, version in closed]
    else:
        assert {version for _, version in closed} == {-1}
    scores = [x for n in nodes for x in n.teacher]
    if tree.taught:
        np.testing.assert_array_equal(tree.teacher_logprob, np.float32(scores))
    else:
        assert np.isnan(scores).all()
    if tree.timed:
        columns = (tree.opened_s, tree.first_s, tree.last_s)
        np.testing.assert_array_equal(np.stack(columns, axis=1), np.float32([n.times for n in nodes]))
    else:
        assert np.isnan([n.times[0] for n in nodes]).all()
    assert tree.kind.tolist() == [n.kind for n in nodes]
    assert (tree.end - tree.start).tolist() == [len(n.tokens) for n in nodes]
    parents = [-1 if n.parent < 0 else index[naive.nearest(n.parent)] for n in nodes]
    assert tree.parent.tolist() == parents

    assert tree.leaf.tolist() == [index[naive.nearest(node)] for node, *_ in naive.leaves]
    assert tree.outcome.tolist() == [outcome for _, outcome, _, _ in naive.leaves]
    assert tree.origin.tolist() == [origin for _, _, origin, _ in naive.leaves]
    np.testing.assert_array_equal(tree.reward, np.float32([reward for *_, reward in naive.leaves]))
    for number, (node, *_) in enumerate(naive.leaves):
        path = np.concatenate([tree.tokens[tree.start[v] : tree.end[v]] for v in tree.path(number)])
        assert path.tolist() == naive.path_tokens(node)
    assert tree.sampled_prompt.tolist() == whole.sampled
    assert tree.guide == len(whole.sampled)
    for handle in range(len(whole.nodes)):  # what the engine goes on from begins with the prompt sampled from
        begins = growth.path_tokens(handle)[: growth.depth(0)].tolist()
        assert begins == (whole.sampled or whole.nodes[0].tokens)

    tools = [last[h] for h, n in enumerate(whole.nodes) if n.kind == Kind.TOOL]
    assert [c.node for c in tree.calls] == [index[naive.nearest(h)] for h in tools]
    assert [f.node for f in tree.forks] == [index[naive.nearest(h)] for h in tools]
    assert (tree.budget, tree.started_s, tree.closed_s) == (8, 1.0, 7.0)


@given(growths())
def test_tokens_keep_the_first_record_of_their_experts(case: tuple[TreeBuilder, Naive]) -> None:
    growth, naive = case
    for node in range(len(naive.nodes)):
        unknown = [token not in naive.routes for token in naive.path_tokens(node)]
        assert growth.unrouted(node) == [*unknown, True].index(True)
    tree = growth.close(7.0)
    none = [[255] * 3] * 2
    expected = [naive.routes.get(token, none) for token in tree.tokens.tolist()]
    if tree.routed:
        assert tree.routes.dtype == np.uint8
        assert tree.routes.tolist() == expected
    else:
        assert all(row == none for row in expected)


def test_routes_of_tokens_that_are_not_there_are_refused() -> None:
    growth = TreeBuilder("p", "t", [0, 1], budget=1)
    for first, count in ((-1, 1), (1, 2), (3, 0)):
        with pytest.raises(TreeError, match="on a path of 2"):
            growth.route(growth.prompt, first, np.zeros((count, 1, 1), np.uint8))


@given(growths())
def test_restored_is_the_same_growth(case: tuple[TreeBuilder, Naive]) -> None:
    growth, naive = case
    arrays, fields = growth.state()
    again = TreeBuilder.restore(arrays, fields)
    for node in range(len(naive.nodes)):
        assert again.path_tokens(node).tolist() == naive.path_tokens(node)
        assert again.children(node) == growth.children(node)
    tree, other = growth.close(7.0), again.close(7.0)
    for name in (*ARRAYS, "routes"):
        if name not in ("reward", "correct"):
            np.testing.assert_array_equal(getattr(other, name), getattr(tree, name))
    assert (other.calls, other.forks, other.guide) == (tree.calls, tree.forks, tree.guide)
    assert ("trained_prompt" in arrays, "guide" in fields) == (bool(naive.sampled),) * 2


def paths(tree: Tree) -> list[list[tuple[float, ...]]]:
    """(token, log-probability, entropy, version) of all tokens on each leaf's path."""
    columns = np.stack([tree.tokens, tree.logprob, np.nan_to_num(tree.entropy, nan=-1), tree.version], 1)
    spans = [[slice(tree.start[n], tree.end[n]) for n in tree.path(leaf)] for leaf in range(tree.n_leaves)]
    return [[tuple(row) for span in one for row in columns[span].tolist()] for one in spans]


@given(growths(), st.integers(0, 2**32 - 1))
def test_going_on_inside_a_turn_leaves_every_other_path_as_it_was(
    case: tuple[TreeBuilder, Naive], seed: int
) -> None:
    growth, naive = case
    before, rng = growth.close(7.0), np.random.default_rng(seed)
    turns = [h for h, n in enumerate(naive.nodes) if n.kind == Kind.MODEL and len(n.tokens) > 1]
    added: list[int] = []
    for turn in rng.choice(turns, min(len(turns), 3), replace=False).tolist() if turns else []:
        at = growth.depth(turn) - int(rng.integers(1, len(naive.nodes[turn].tokens)))
        child = growth.node(turn, Kind.MODEL, at)
        growth.extend(child, [9_000_001, 9_000_002], -0.5, 0.25, 3)
        growth.leaf(child, Outcome.STOPPED, Origin.FORK)
        assert growth.path_tokens(child)[:at].tolist() == growth.path_tokens(turn)[:at].tolist()
        assert growth.turn(child) == growth.turn(turn)
        added.append(at)
    after = growth.close(7.0)
    old, new = paths(before), paths(after)
    assert new[: len(old)] == old
    longer = len(naive.nodes[0].tokens) - growth.depth(0)  # than the prompt that was sampled from
    assert [len(path) for path in new[len(old) :]] == [at + longer + 2 for at in added]
    assert after.n_tokens == before.n_tokens + 2 * len(added), "what is shared stands there once"


def test_a_turn_that_was_gone_on_from_inside_closes_as_its_parts() -> None:
    growth = TreeBuilder("p", "t", [0, 1], budget=3)
    turn = growth.node(growth.prompt, Kind.MODEL)
    growth.extend(turn, [2, 3, 4, 5], [-1, -2, -3, -4], [1, 2, 3, 4], [6, 6, 7, 7])
    result = growth.node(turn, Kind.TOOL)
    growth.extend(result, [6])
    growth.call(ToolCall(result, "search", {}, "ok", 0.0))
    growth.leaf(result, Outcome.LENGTH, Origin.ROOT)
    for at, token in ((5, 7), (3, 8), (5, 9)):  # the prompt's 2 and so many of the turn's own
        growth.extend(child := growth.node(turn, Kind.MODEL, at), [token], -0.5, 0.5, 8)
        growth.leaf(child, Outcome.STOPPED, Origin.FORK)
        assert growth.turn(child) == 2
    tree = growth.close(0.0)
    assert [part.tolist() for part in np.split(tree.tokens, tree.start[1:])] == [
        *([0, 1], [2], [3, 4], [5], [6], [7], [9], [8])
    ]
    assert tree.parent.tolist() == [-1, 0, 1, 2, 3, 2, 2, 1]
    assert tree.logprob[2:6].tolist() == [-1, -2, -3, -4]
    assert tree.version[2:6].tolist() == [6, 6, 7, 7]
    assert tree.leaf.tolist() == [4, 5, 7, 6]
    assert tree.calls[0].node == 4


def test_a_fork_shares_the_prefix_and_a_straight_branch_copies_nothing() -> None:
    growth = TreeBuilder("p", "t", list(range(1000)), budget=2)
    thought = growth.node(growth.prompt, Kind.MODEL)
    growth.extend(thought, [1, 2], logprob=-0.5, version=3)
    result = growth.node(thought, Kind.TOOL)
    growth.extend(result, [3])
    parent = growth.node(result, Kind.MODEL)
    growth.extend(parent, [4], logprob=-0.1, version=3)
    child = growth.node(result, Kind.MODEL)
    growth.extend(child, [5], logprob=-0.1, version=4)
    assert np.shares_memory(growth.path_tokens(parent), growth.path_tokens(thought))
    assert not np.shares_memory(growth.path_tokens(child), growth.path_tokens(parent))
    assert growth.path_tokens(child).tolist() == [*range(1000), 1, 2, 3, 5]
    assert growth.depth(child) == 1004
    assert growth.n_tokens(child) == 1
    with pytest.raises(ValueError, match="read-only"):
        growth.path_tokens(child)[0] = 9


def test_a_long_branch_appends_in_amortised_constant_time() -> None:
    growth = TreeBuilder("p", "t", [0], budget=1)
    node = growth.node(growth.prompt, Kind.MODEL)
    buffers = set()
    for _ in range(10_000):
        growth.extend(node, [1], -0.1, 0.2, 0)
        buffers.add(growth.path_tokens(node).__array_interface__["data"][0])
    assert growth.path_tokens(node).size == 10_001
    assert len(buffers) < 12  # one per doubling, not one per append


def test_a_scalar_version_stands_for_the_chunk_and_chunks_are_copied() -> None:
    growth = TreeBuilder("p", "t", [0], budget=1)
    node = growth.node(growth.prompt, Kind.MODEL)
    chunk, logprob = np.array([1, 2], np.int32), np.array([-1, -2], np.float32)
    growth.extend(node, chunk, logprob, None, 5)
    chunk[:] = 9
    logprob[:] = 9
    growth.leaf(node, Outcome.STOPPED, Origin.ROOT)
    tree = growth.close(0.0)
    assert tree.tokens.tolist() == [0, 1, 2]
    assert tree.logprob.tolist() == [0, -1, -2]
    assert tree.version.tolist() == [-1, 5, 5]
    assert np.isnan(tree.entropy).all()


def _growth() -> tuple[TreeBuilder, int]:
    growth = TreeBuilder("p", "t", [0], budget=1)
    node = growth.node(growth.prompt, Kind.MODEL)
    growth.extend(node, [1], -0.1, None, 0)
    return growth, node


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda g, n: (g.node(n, Kind.TOOL), g.extend(n, [2], -0.1, None, 0)), "has children"),
        (
            lambda g, n: (g.leaf(n, Outcome.STOPPED, Origin.ROOT), g.extend(n, [2], -0.1, None, 0)),
            "has a leaf",
        ),
        (lambda g, n: g.extend(n, [2]), "need their log-prob"),
        (lambda g, n: g.extend(g.node(n, Kind.TOOL), [2], -0.1), "were not sampled"),
        (lambda g, n: g.extend(g.prompt, [2]), "has children"),
        (lambda g, n: g.extend(n, [2, 3], [-0.1], None, 0), "logprob has shape"),
        (lambda g, n: g.extend(n, [[2, 3]], -0.1, None, 0), "vector of token ids"),
        (lambda g, n: g.node(7, Kind.MODEL), "no node 7"),
        (lambda g, n: g.node(n, Kind.MODEL, 1), "node 1: a child cannot begin at 1"),  # its first token
        (lambda g, n: g.node(n, Kind.MODEL, 3), "cannot begin at 3"),
        (lambda g, n: g.node(g.prompt, Kind.MODEL, 0), "cannot begin at 0"),
        (lambda g, n: (g.extend(n, [2], -0.1, None, 0), g.node(n, Kind.TOOL, 2)), "only MODEL goes on"),
        (lambda g, n: g.node(n, Kind.PROMPT), "one PROMPT"),
        (lambda g, n: g.call(ToolCall(9, "search", {}, "ok", 0.0)), "no node 9"),
        (lambda g, n: g.score(g.leaf(n, Outcome.STOPPED, Origin.ROOT), float("nan"), False), "finite"),
        (lambda g, n: g.close(0.0), "no leaf says why"),
    ],
)
def test_misuse_is_named(use, message: str) -> None:
    growth, node = _growth()
    with pytest.raises(TreeError, match=message):
        use(growth, node)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(TreeError, match="no tokens"):
        TreeBuilder("p", "t", [], budget=1)
