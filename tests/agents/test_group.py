"""Groups of episodes as trees, against a naive flattening of their forests."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from system.agents.forest import AgentCall, Episode, Forest, trained_ends
from system.agents.group import plant_group
from system.rollout.failure import RolloutFailed
from system.tree.prompt import Prompt
from system.tree.record import Kind, Outcome, Tree, validate
from system.tree.stats import TreeStats

PROMPT = Prompt("q1", ({"role": "user", "content": "?"},), ("4",), "lookup")
Token = tuple[int, float, int]  # its id, its log-probability, its version (-1: context)


def grown(seed: int) -> Forest:
    """A random forest of few different tokens; everything begins with token 7."""
    rng, forest = np.random.default_rng(seed), Forest()
    for number in range(int(rng.integers(0, 12))):
        tokens = rng.integers(0, 3, int(rng.integers(1, 5))).astype(np.int32)
        parent = int(rng.integers(-1, number)) if number else -1
        if parent >= 0 and rng.random() < 0.6:
            logprob, entropy = -rng.random((2, tokens.size)).astype(np.float32)
            version = rng.integers(0, 4, tokens.size).astype(np.int32)
            piece = forest.add_turn(parent, tokens, logprob, -entropy, version, trained=rng.random() < 0.8)
            forest.pieces[piece].reward = float(rng.integers(0, 2))
        else:
            forest.add_context(parent, np.append([7] if parent < 0 else [], tokens).astype(np.int32))
    return forest


def episode(forest: Forest, seed: int) -> Episode:
    rng = np.random.default_rng([seed, 1])
    ends = [end for end in trained_ends(forest) if rng.random() < 0.8]
    found = Episode(f"k{seed}", seed, "q1", forest, Outcome.ENDED, ends)
    if rng.random() < 0.8:
        found.reward = float(rng.integers(0, 2))
        found.correct = int(found.reward)
    return found


def naive(one: Episode) -> list[list[Token]]:
    """Each chosen chain, token by token, up to the last that is trained on."""
    found: list[list[Token]] = []
    for end in one.chosen:
        chain: list[Token] = []
        for piece in (one.forest.pieces[number] for number in one.forest.path(end)):
            said = zip(piece.tokens.tolist(), piece.logprob.tolist(), piece.version.tolist(), strict=False)
            chain += list(said) if piece.trained else [(token, 0.0, -1) for token in piece.tokens.tolist()]
        while chain[-1][2] < 0:
            chain.pop()
        found.append(chain)
    return found


def told(tree: Tree, leaf: int) -> list[Token]:
    columns = (tree.tokens.tolist(), tree.logprob.tolist(), tree.version.tolist())
    tokens = list(zip(*columns, strict=True))
    return [tokens[t] for node in tree.path(leaf) for t in range(tree.start[node], tree.end[node])]


def maximal(chains: list[list[Token]]) -> list[list[Token]]:
    """Without those that another one goes on from, and each once."""
    once = [chain for number, chain in enumerate(chains) if chain not in chains[:number]]
    return [
        chain for chain in once if not any(chain == other[: len(chain)] and chain != other for other in once)
    ]


GROUPS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5)


@settings(deadline=None)
@given(GROUPS)
def test_every_path_is_a_chain_and_every_chain_a_path(seeds: list[int]):
    episodes = [episode(grown(seed), seed) for seed in seeds]
    if not any(one.chosen for one in episodes):
        with pytest.raises(RolloutFailed, match="no_turn: no agent of"):
            plant_group(PROMPT, episodes, len(episodes))
        return
    tree = plant_group(PROMPT, episodes, len(episodes))
    validate(tree)
    paths: dict[int, list[list[Token]]] = defaultdict(list)
    for leaf, number in enumerate(tree.episode.tolist()):
        paths[number].append(told(tree, leaf))
        np.testing.assert_equal(float(tree.reward[leaf]), episodes[number].reward)
        assert tree.correct[leaf] == episodes[number].correct
    assert [*paths] == list(range(len(episodes)))
    for number, one in enumerate(episodes):
        wanted = maximal(naive(one))
        if not wanted:
            assert paths[number] == [told(tree, 0)[: tree.end[0]]]
        assert sorted(paths[number]) == sorted(wanted or paths[number])


@settings(deadline=None)
@given(GROUPS)
def test_what_was_sampled_stands_once_and_context_is_shared_where_nothing_sampled_differs(seeds: list[int]):
    episodes = [one for seed in seeds if (one := episode(grown(seed), seed)).chosen]
    if not episodes:
        return
    tree = plant_group(PROMPT, episodes, len(episodes))
    turns = {
        (number, piece)
        for number, one in enumerate(episodes)
        for end in one.chosen
        for piece in one.forest.path(end)
        if one.forest.pieces[piece].trained
    }
    sampled = sum(episodes[number].forest.pieces[piece].tokens.size for number, piece in turns)
    assert TreeStats.of(tree).generated == sampled
    earned = sum(episodes[number].forest.pieces[piece].reward for number, piece in turns)
    assert float(tree.step_reward.sum()) == pytest.approx(earned)
    chains = [[token for token, _, _ in chain] for one in episodes for chain in naive(one)]
    contexts = [
        next(at for at, (_, _, version) in enumerate(chain) if version >= 0)
        for one in episodes
        for chain in naive(one)
    ]
    root = 0
    while root < min(contexts) and len({chain[root] for chain in chains}) == 1:
        root += 1
    assert tree.end[0] == root
    first = [
        (int(parent), int(tree.tokens[start]))
        for parent, start, kind in zip(tree.parent, tree.start, tree.kind, strict=True)
        if kind == Kind.TOOL
    ]
    assert len(set(first)) == len(first)  # no two siblings of context begin alike


def said(forest: Forest, parent: int, *tokens: int, trained: bool = True) -> int:
    ids = np.array(tokens, np.int32)
    row = np.full(ids.size, -0.5, np.float32)
    return forest.add_turn(parent, ids, row, row * -1, np.zeros(ids.size, np.int32), trained=trained)


def asked(forest: Forest, parent: int, *tokens: int) -> int:
    return forest.add_context(parent, np.array(tokens, np.int32))


def test_samples_of_one_request_are_turns_of_their_own_even_where_they_agree():
    forest = Forest()
    question = asked(forest, -1, 1, 2)
    said(forest, question, 5, 6)
    said(forest, question, 5, 6)
    tree = plant_group(
        PROMPT, [Episode("k", 0, "q1", forest, Outcome.ENDED, trained_ends(forest), 1.0, 1)], 1
    )
    assert tree.kind.tolist() == [Kind.PROMPT, Kind.MODEL, Kind.MODEL]
    assert tree.episode.tolist() == [0, 0]


def test_another_models_turns_are_context():
    forest = Forest()
    judge = said(forest, asked(forest, -1, 1, 2), 5, 6, trained=False)
    said(forest, asked(forest, judge, 3), 8)
    tree = plant_group(PROMPT, [Episode("k", 0, "q1", forest, Outcome.ENDED, trained_ends(forest))], 1)
    assert tree.tokens.tolist() == [1, 2, 5, 6, 3, 8]
    assert tree.kind.tolist() == [Kind.PROMPT, Kind.MODEL]
    assert math.isnan(tree.reward[0])


def test_calls_stand_where_their_answers_are_told():
    forests = []
    for answer in (30, 31):
        forest = Forest()
        turn = said(forest, asked(forest, -1, 1, 2), 5)
        said(forest, asked(forest, turn, answer), 6)
        forests.append(forest)
    episodes = [
        Episode("k", n, "q1", forest, Outcome.ENDED, trained_ends(forest), float(n), n)
        for n, forest in enumerate(forests)
    ]
    for number, one in enumerate(episodes):
        one.calls = [AgentCall(2, "search", {"query": number}, "…")]
    tree = plant_group(PROMPT, episodes, 2)
    for call, answer in zip(tree.calls, (30, 31), strict=True):
        assert tree.tokens[tree.start[call.node]] == answer
    assert TreeStats.of(tree).calls_per_leaf.tolist() == [1, 1]


def test_an_agent_that_never_asked_still_counts_in_its_group():
    forest = Forest()
    said(forest, asked(forest, -1, 1, 2), 5)
    right = Episode("a", 0, "q1", forest, Outcome.ENDED, trained_ends(forest), 1.0, 1)
    mute = Episode("b", 1, "q1", Forest(), Outcome.ENDED, [], 0.0, 0)
    stats = TreeStats.of(plant_group(PROMPT, [right, mute], 2))
    assert stats.rewards.tolist() == [1.0, 0.0]
    assert stats.response_tokens.tolist() == [1, 0]


def test_requests_without_a_common_beginning_are_refused_by_name():
    forest = Forest()
    said(forest, asked(forest, -1, 1, 2), 5)
    said(forest, asked(forest, -1, 9), 5)
    with pytest.raises(RolloutFailed, match=r"no_beginning: .*begins with different tokens"):
        plant_group(PROMPT, [Episode("k", 0, "q1", forest, Outcome.ENDED, trained_ends(forest))], 1)
