"""Trees that go on at turns once all branches have ended: AT²PO, Tree-GRPO."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest
from rollout_fakes import PROMPT, PieceTokenizer, ScriptedEngine, Segment, World, make_world

from system.engine.protocol import Chunk, GenerateRequest
from system.plugins import POLICIES, PluginError
from system.rollout.branching import Policy, Turn
from system.rollout.expanding import MostUncertainTurns, RandomTurns, UnlikelyTokens
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


def turn(*logprobs: float, root: int = 0, rewrites: bool = False) -> Turn:
    return Turn(0.0, 1, 0, root, np.array(logprobs, np.float32), rewrites)


def test_treerl_takes_the_least_likely_tokens_of_each_root() -> None:
    found = [turn(-1, -9, -2), turn(-5, -4, root=1), turn(-8, -3, -7), turn(-99, -6, root=1, rewrites=True)]
    best = [(0, 1), (3, 1), (2, 0), (1, 0)]  # each root's first, then each root's second; -99 is a fork's own
    assert UnlikelyTokens(4, width=1).expand(found, 99, RNG) == best
    assert UnlikelyTokens(4, width=2).expand(found, 99, RNG) == best * 2
    assert UnlikelyTokens(4, width=2, tokens=1).expand(found, 99, RNG) == best[:2] * 2
    few = [turn(-1), turn(-1, rewrites=True, root=1)]
    assert UnlikelyTokens(4, width=1, tokens=3).expand(few, 99, RNG) == [(0, 0)] * 3, "the best again"


def test_treerl_without_tokens_is_refused() -> None:
    with pytest.raises(PluginError, match=r"branching.options.tokens=0 must be 1 or more"):
        POLICIES.make("treerl", {"tokens": 0}, probe_tokens=4)


class Surprising(ScriptedEngine):
    """Each token has a log-probability of its own, by its place and its request's seed.  What it is given of
    a turn that was cut is what it would have said: it says the rest with other words.
    """

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        draws = np.random.default_rng(request.sampling.seed)
        async for chunk in super().generate(request):
            yield replace(chunk, logprob=-draws.uniform(0.1, 5.0, chunk.tokens.size).astype(np.float32))


def going_on(text: str, rng: np.random.Generator) -> Segment:
    """As :func:`two_calls`, from wherever a turn was cut: "<think> w w w w </think>", then what it does."""
    written = text.rsplit("</result>")[-1].lstrip()
    calls = text.count("</result>") < 2
    whole = ["<think>", " ", *[piece for _ in range(4) for piece in (f"w{rng.integers(10**6)}", " ")]]
    whole += ["</think>", " "]
    whole += ["<search>", " ", "q", " ", "</search>"] if calls else ["<answer>", " ", "me", " ", "</answer>"]
    return Segment("".join(whole[len(PieceTokenizer().encode(written)) :]))


def treerl(leaves: int, roots: int, seed: int = 3, **options: int) -> tuple[TreeRollout, Tree, World]:
    world = make_world(going_on, policy=UnlikelyTokens(4, **options), leaves=leaves, roots=roots)
    engine = Surprising(world.tokenizer, going_on, PROMPT.messages[0]["content"])
    world.context = replace(world.context, engine=engine)
    rollout = TreeRollout(world.context, PROMPT, seed=seed)
    return rollout, run(rollout.run()), world


@pytest.mark.parametrize("seed", range(5))
def test_a_treerl_tree_forks_at_the_least_likely_tokens_of_its_first_chains(seed: int) -> None:
    """M(1 + N·L·T) leaves, here 3·(1 + 2·1·2): what is forked at is what the chains hold unlikely."""
    _, tree, _ = treerl(15, 3, seed, width=2, tokens=2)
    assert (tree.n_leaves, tree.origins(Origin.ROOT)) == (15, 3)
    assert tree.origins(Origin.FORK) + tree.origins(Origin.TOP_UP) == 12
    column = dict(zip(range(tree.n_tokens), zip(tree.tokens, tree.logprob, strict=True), strict=True))
    spans = [
        [i for node in tree.path(leaf)[1:] for i in range(tree.start[node], tree.end[node])]
        for leaf in range(15)
    ]
    sampled = {i for n in np.flatnonzero(tree.kind == Kind.MODEL) for i in range(tree.start[n], tree.end[n])}
    for chain in spans[:3]:
        best = sorted((i for i in chain if i in sampled), key=lambda i: column[i][1])[:2]
        others = [one for one in spans[3:] if one[0] == chain[0]]
        left = [next(i for i, j in zip(chain, one, strict=False) if i != j) for one in others]
        inside = {i for i in best if i != chain[0]}
        assert {*left} == inside
        assert len(left) == 2 * len(inside)


@pytest.mark.parametrize("seed", range(5))
def test_a_turn_cut_inside_is_one_turn_to_whoever_reads_it(seed: int) -> None:
    """Two calls on every path, each made by the whole turn's text; nothing before the cut is called again."""
    rollout, tree, world = treerl(20, 2, seed, width=2, tokens=3)
    for leaf, (branch, _) in enumerate(rollout.ended):
        kinds = [kind for kind, _ in branch.segments]
        assert kinds == [*[Kind.MODEL, Kind.TOOL] * 2, Kind.MODEL]
        text = world.text(
            np.concatenate([tree.tokens[tree.start[n] : tree.end[n]] for n in tree.path(leaf)[1:]])
        )
        assert "".join(said for _, said in branch.segments) == text.removesuffix("<eos>")
        assert text.count("<think>") == text.count("</think>") == 3
    inside = (tree.kind[1:] == Kind.MODEL) & (tree.kind[tree.parent[1:]] == Kind.MODEL)
    assert inside.sum() > 4
    assert len(world.tools.calls) == int((tree.kind == Kind.TOOL).sum())


class TooFar(RandomTurns):
    def expand(self, turns: list[Turn], room: int, rng: np.random.Generator) -> list[tuple[int, int]]:  # type: ignore[override]
        return [(0, turns[0].logprobs.size)]


def test_a_choice_beyond_a_turn_is_refused_by_name() -> None:
    with pytest.raises(PluginError, match=r"branching=TooFar: expand\(\) returned \(0, \d+\): no token"):
        grown(TooFar(4), leaves=5, roots=2)
