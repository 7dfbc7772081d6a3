"""When the nodes of a grown tree were opened, and their first and last tokens came; in virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from rollout_fakes import PROMPT, Segment, World, make_world, ok

from system.rollout.branching import Never, Random
from system.rollout.snapshot import freeze, thaw
from system.rollout.tree_rollout import TreeRollout
from system.tree.record import Kind, Origin, Tree
from system.twin.clock import run

CALL = "<think> hm </think> <search> a query </search>"
ANSWER = "<think> so </think> <answer> \\boxed{ me } </answer>"
TOOL_S, FIRST_S, TOKEN_S, CHUNK = 2.0, 0.5, 0.01, 3


def one_call(text: str, rng: np.random.Generator) -> Segment:
    return Segment(ANSWER if "<result>" in text else CALL, first_s=FIRST_S, token_s=TOKEN_S, chunk=CHUNK)


def timed(world: World) -> World:
    """With the loop's clock, long after 1970."""
    world.context = replace(world.context, now=lambda: 5000.0 + asyncio.get_running_loop().time())
    return world


def rows(tree: Tree) -> np.ndarray:
    return np.stack([tree.opened_s, tree.first_s, tree.last_s], axis=1)


def test_a_node_says_when_it_was_opened_and_when_its_tokens_came() -> None:
    world = timed(make_world(one_call, lambda *_: ok(seconds=TOOL_S), policy=Never(4), leaves=2, roots=2))

    async def main() -> Tree:
        await asyncio.sleep(3.0)  # the tree's start is not the loop's
        return await TreeRollout(world.context, PROMPT, seed=1).run()

    tree = run(main())
    assert tree.timed
    assert np.isnan(rows(tree)[0]).all(), "the prompt was there"
    spent = FIRST_S + TOKEN_S * (np.diff(tree.start, append=tree.n_tokens) - CHUNK)
    for leaf in range(2):
        _, call, result, answer = tree.path(leaf)
        asked = spent[call] + TOOL_S
        expected = [
            [0.0, FIRST_S, spent[call]],
            [asked, asked, asked],  # the answer comes whole
            [asked, asked + FIRST_S, asked + spent[answer]],
        ]
        np.testing.assert_allclose(rows(tree)[[call, result, answer]], expected, atol=1e-4)
        (made,) = (one for one in tree.calls if one.node == result)
        assert made.began_s == pytest.approx(spent[call])
    assert tree.closed_s - tree.started_s >= rows(tree)[1:].max() - 1e-4


def test_a_fork_begins_when_it_was_decided() -> None:
    """At the fourth token behind the result, not at the result."""
    policy = Random(4, 1.0)
    world = timed(make_world(one_call, lambda *_: ok(seconds=TOOL_S), policy=policy, leaves=2, roots=1))

    async def main() -> Tree:
        return await TreeRollout(world.context, PROMPT, seed=1).run()

    tree = run(main())
    (forked,) = np.flatnonzero(tree.origin == Origin.FORK)
    fork = int(tree.leaf[forked])
    result = int(tree.parent[fork])
    assert tree.kind[result] == Kind.TOOL
    assert tree.opened_s[fork] - tree.last_s[result] == pytest.approx(FIRST_S + 3 * TOKEN_S, abs=1e-3)


def test_a_resumed_tree_says_how_long_nobody_grew_it() -> None:
    world = timed(make_world(one_call, lambda *_: ok(seconds=TOOL_S), policy=Never(4), leaves=2, roots=2))

    async def main() -> Tree:
        growing = TreeRollout(world.context, PROMPT, seed=1)
        task = asyncio.ensure_future(growing.run())
        await asyncio.sleep(1.5)  # both branches' calls are under way
        data = freeze(growing)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(100.0)
        return await thaw(world.context, PROMPT, data).run()

    tree = run(main())
    assert np.array(tree.meta["away_s"]) == pytest.approx(np.array([[1.5, 101.5]]))
    for leaf in range(2):
        _, call, result, answer = tree.path(leaf)
        assert rows(tree)[call, :2] == pytest.approx([0.0, FIRST_S]), "it was written before"
        assert tree.opened_s[result] == pytest.approx(101.5 + TOOL_S), "the call was made again"
        assert tree.first_s[answer] == pytest.approx(101.5 + TOOL_S + FIRST_S)
