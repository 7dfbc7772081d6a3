"""The gold answer scored behind the prompt and each tool result: what is asked, and what the record holds."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_fakes import PROMPT, Segment, World, make_world

from system.engine.protocol import EngineError, GenerateRequest
from system.rollout.branching import Random
from system.rollout.encode import encode_text
from system.rollout.request import GivenTokens
from system.rollout.snapshot import freeze, thaw
from system.rollout.tree_rollout import TreeRollout
from system.tree.builder import TreeBuilder
from system.tree.record import Kind, Tree
from system.twin.clock import run

CALL = "<think> hm </think> <search> a query </search>"
ANSWER = "<think> so </think> <answer> \\boxed{ me } </answer>"
OPENING = "<answer> \\boxed{"
PROMPTED = replace(PROMPT, answers=("me and you", "us"))


def script(text: str, rng: np.random.Generator) -> Segment:
    """Two calls, then the answer."""
    return Segment(ANSWER if text.count("<result>") > 1 else CALL)


def world(**config: Any) -> World:
    return make_world(
        script,
        policy=Random(4, 0.5),
        **({"leaves": 6, "roots": 3, "score_answer": True, "temperature": 0.7} | config),
    )


def grow(world: World, prompt: Any = PROMPTED, **options: Any) -> Tree:
    return run(TreeRollout(world.context, prompt, **({"seed": 1} | options)).run())


def by_length(asked: GenerateRequest, call: int) -> np.ndarray:
    """Falls with the place in the sequence: every context, and every token of the answer, has its own."""
    assert asked.score_from is not None
    return -np.arange(asked.score_from, asked.input_ids.size) / 100


def depths(tree: Tree) -> list[int]:
    """[J] tokens to the end of each node."""
    size = (tree.end - tree.start).astype(int)
    return [int(size[path(tree, node)].sum()) for node in range(tree.n_nodes)]


def path(tree: Tree, node: int) -> list[int]:
    return [] if node < 0 else [*path(tree, int(tree.parent[node])), node]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99))
def test_the_mean_over_the_answers_own_tokens_behind_every_prompt_and_result(seed: int) -> None:
    one = world()
    one.engine.scores = by_length
    tree = grow(one, seed=seed)
    words = encode_text(one.tokenizer, OPENING + "me and you")
    first = encode_text(one.tokenizer, OPENING).size
    known = np.isfinite(tree.answer_logprob)
    np.testing.assert_array_equal(known, tree.kind != Kind.MODEL)
    for node, depth in enumerate(depths(tree)):
        if known[node]:
            expected = -np.arange(depth + first, depth + words.size).mean() / 100
            assert tree.answer_logprob[node] == pytest.approx(expected, abs=1e-5)
    contexts = [tuple(asked.input_ids[: -words.size].tolist()) for asked in one.engine.scored]
    assert len(contexts) == known.sum(), "each once"
    for asked in one.engine.scored:
        assert asked.input_ids[-words.size :].tolist() == words.tolist()
        assert asked.score_from == asked.input_ids.size - words.size + first
        assert (asked.sampling.temperature, asked.route) == (0.7, one.engine.requests[0].route)
    assert not tree.rescored


def test_off_nothing_is_asked() -> None:
    one = world(score_answer=False)
    assert grow(one).answer_logprob.size == 0
    assert one.engine.scored == []
    assert grow(world(), greedy=True).answer_logprob.size == 0


def test_what_cannot_be_scored_is_unknown_and_told() -> None:
    """A score that fails; a prompt without an answer, once for each place; nothing of it costs the tree."""
    one = world()
    one.engine.scores = lambda asked, call: EngineError("gone") if call == 0 else by_length(asked, call)
    tree = grow(one)
    assert np.isnan(tree.answer_logprob[0])
    assert np.isfinite(tree.answer_logprob[tree.kind == Kind.TOOL]).all()
    assert [kind for kind, _ in tree.meta["mishaps"]] == ["answer"]
    none = world()
    tree = grow(none, replace(PROMPT, answers=()))
    assert none.engine.scored == []
    assert {text for _, text in tree.meta["mishaps"]} == {"prompt 'p1' has no gold answer to score"}
    assert tree.answer_logprob.size == 0
    assert tree.n_leaves == 6


def test_a_context_without_room_for_the_answer_is_left_out() -> None:
    one = world()
    one.engine.scores = by_length
    whole = grow(one)
    longest = max(depth for depth, kind in zip(depths(whole), whole.kind, strict=True) if kind == Kind.TOOL)
    words = encode_text(one.tokenizer, OPENING + "me and you").size
    for room, fits in ((longest + words, False), (longest + words + 1, True)):
        again = world()
        again.engine.scores = by_length
        object.__setattr__(again.context, "max_context", room)
        tree = grow(again)
        last = (tree.kind == Kind.TOOL) & (np.array(depths(tree)) == longest)
        assert last.any()
        assert np.isfinite(tree.answer_logprob[last]).all() == fits
        assert np.isfinite(tree.answer_logprob[0])


def test_a_token_made_of_opening_and_answer_is_the_answers() -> None:
    class Merging:
        """Reads letters, but for "{m", which is one token."""

        def encode(self, text: str, **_: Any) -> list[int]:
            return [ord(letter) for letter in text.replace("{m", "@")]

    one = world(answer_opening="a{")
    object.__setattr__(one.context, "tokenizer", Merging())
    given = GivenTokens(one.context, TreeBuilder("p", "t", [1], 1), "p", "", 1.0, "me", lambda *_: None)
    words, first = given._answer
    assert "".join(map(chr, words)) == "a@e"
    assert first == 1
    plain = replace(given, gold="ex")
    assert plain._answer[1] == 2


def test_a_saved_tree_keeps_the_scores_of_its_answer() -> None:
    one = world()
    one.engine.scores = by_length

    async def main() -> bytes:
        tree = TreeRollout(one.context, PROMPTED, seed=1)
        task = asyncio.create_task(tree.run())
        await asyncio.sleep(2.6)
        data = freeze(tree)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return data

    data = run(main())
    before = len(one.engine.scored)
    tree = run(thaw(one.context, PROMPTED, data).run())
    assert before >= 4, "the prompt, and the first results"
    assert np.isfinite(tree.answer_logprob[tree.kind != Kind.MODEL]).all()
    assert len(one.engine.scored) == (tree.kind != Kind.MODEL).sum(), "none was asked for twice"
