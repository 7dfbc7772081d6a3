"""Trees that go on at turns once all branches have ended: AT²PO, Tree-GRPO."""

from __future__ import annotations

import numpy as np
import pytest
from rollout_fakes import PROMPT, Segment, World, make_world

from system.plugins import POLICIES, PluginError
from system.rollout.branching import Policy, Turn
from system.rollout.expanding import MostUncertainTurns, RandomTurns
from system.rollout.expansion import places
from system.rollout.tree_rollout import TreeRollout
from system.tree.record import Kind, Origin, Tree
from system.twin.clock import run

RNG = np.random.default_rng(0)


def turns(*surprises: float, siblings: int = 1) -> list[Turn]:
    return [Turn(surprise, siblings, 0) for surprise in surprises]


def test_at2po_takes_the_most_uncertain_turns_and_the_best_again_where_there_are_few() -> None:
    policy = MostUncertainTurns(4, width=2)
    assert policy.expand(turns(0.1, 0.9, 0.5), 9, RNG) == [1, 2]
    assert policy.expand(turns(0.1), 9, RNG) == [0, 0]
    crowded = [Turn(0.50, siblings=3, calls=0), Turn(0.42, siblings=1, calls=0)]
    assert policy.expand(crowded, 9, RNG) == [1, 0], "0.50 - 2·0.05 < 0.42"


def test_random_turns_are_drawn_with_repeats() -> None:
    drawn = RandomTurns(4, width=200).expand(turns(0.1, 0.2, 0.3), 999, np.random.default_rng(1))
    assert {*drawn} == {0, 1, 2}


def test_a_width_of_nothing_is_refused() -> None:
    with pytest.raises(PluginError, match=r"branching.options.width=0 must be 1 or more"):
        POLICIES.make("at2po", {"width": 0}, probe_tokens=4)


def two_calls(text: str, rng: np.random.Generator) -> Segment:
    """Two calls, then the answer; every turn says a word of its own."""
    word = f"w{rng.integers(10**6)}"
    if text.count("<result>") < 2:
        return Segment(f"<think> {word} </think> <search> a query </search>")
    return Segment(f"<think> {word} </think> <answer> \\boxed{{ me }} </answer>")


def grown(policy: Policy, **sizes: int) -> tuple[Tree, World]:
    world = make_world(two_calls, policy=policy, **sizes)
    return run(TreeRollout(world.context, PROMPT, seed=3).run()), world


@pytest.mark.parametrize("policy", [MostUncertainTurns(4, width=3), RandomTurns(4, width=2)])
def test_a_tree_expands_when_all_branches_have_ended(policy: Policy) -> None:
    tree, world = grown(policy, leaves=9, roots=3)
    assert tree.n_leaves == 9
    assert tree.origins(Origin.ROOT) == 3
    assert tree.origins(Origin.FORK) + tree.origins(Origin.TOP_UP) == 6
    for leaf in range(9):
        kinds = [Kind(int(tree.kind[node])) for node in tree.path(leaf)]
        assert kinds == [Kind.PROMPT, *[Kind.MODEL, Kind.TOOL] * 2, Kind.MODEL], "two calls on every path"
    assert len(world.tools.calls) == int((tree.kind == Kind.TOOL).sum())
    again = grown(policy, leaves=9, roots=3)[0]
    np.testing.assert_array_equal(again.tokens, tree.tokens)


class OnlyTheLastTurns(RandomTurns):
    """Where two calls come before: nothing is called again."""

    def expand(self, turns: list[Turn], room: int, rng: np.random.Generator) -> list[int]:  # type: ignore[override]
        return [i for i, turn in enumerate(turns) if turn.calls == 2]


def test_what_comes_before_a_turn_is_kept_and_costs_no_call() -> None:
    tree, world = grown(OnlyTheLastTurns(4), leaves=7, roots=2)
    assert tree.origins(Origin.FORK) == 5
    assert len(world.tools.calls) == 4, "those of the two roots"


class Nothing(RandomTurns):
    def expand(self, turns: list[Turn], room: int, rng: np.random.Generator) -> list[int]:  # type: ignore[override]
        return []


def test_without_a_choice_the_rest_are_fresh_roots() -> None:
    tree, _ = grown(Nothing(4), leaves=5, roots=2)
    assert (tree.origins(Origin.ROOT), tree.origins(Origin.TOP_UP)) == (2, 3)


def test_the_places_of_a_tree_are_its_turns_each_once() -> None:
    world = make_world(two_calls, policy=MostUncertainTurns(4, width=3), leaves=6, roots=3)
    rollout = TreeRollout(world.context, PROMPT, seed=5)
    tree = run(rollout.run())
    found = places(rollout.growth, [branch for branch, _ in rollout.ended])
    assert len(found) == int((tree.kind == Kind.MODEL).sum())
    first = [place for place in found if place.before == 0]
    assert all(place.turn.siblings == len(first) and place.turn.calls == 0 for place in first)
    model = tree.kind == Kind.MODEL
    surprise = (
        -np.add.reduceat(tree.logprob, tree.start)[model] / np.diff(tree.start, append=tree.n_tokens)[model]
    )
    assert sorted(place.turn.surprise for place in found) == pytest.approx(sorted(surprise), rel=1e-5)
