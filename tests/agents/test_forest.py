"""The pieces of a session."""

import numpy as np
import pytest

from system.agents.forest import Forest, trained_ends
from system.tree.record import Int32, Kind


def ids(*tokens: int) -> Int32:
    return np.array(tokens, np.int32)


def turn(forest: Forest, parent: int, *tokens: int, trained: bool = True) -> int:
    scores = np.full(len(tokens), -0.5, np.float32)
    return forest.add_turn(parent, ids(*tokens), scores, scores, ids(*[3] * len(tokens)), trained=trained)


def test_a_rewrite_branches_and_the_ends_are_those_without_children() -> None:
    forest = Forest()
    prompt = forest.add_context(-1, ids(1, 2))
    said = turn(forest, prompt, 3)
    told = forest.add_context(said, ids(4))
    last = turn(forest, told, 5, 6)
    other = turn(forest, forest.add_context(prompt, ids(9)), 7, trained=False)

    assert forest.path(last) == [prompt, said, told, last]
    assert forest.tokens(last).tolist() == [1, 2, 3, 4, 5, 6]
    assert forest.tokens(other).tolist() == [1, 2, 9, 7]
    assert forest.children(prompt) == [said, 4]
    assert forest.children(-1) == [prompt]
    assert forest.ends() == [last, other]
    assert trained_ends(forest) == [last]
    assert [piece.kind for piece in forest.pieces] == [
        Kind.TOOL, Kind.MODEL, Kind.TOOL, Kind.MODEL, Kind.TOOL, Kind.MODEL]  # fmt: skip


def test_what_is_no_piece_is_refused() -> None:
    forest = Forest()
    with pytest.raises(ValueError, match="needs tokens"):
        forest.add_context(-1, ids())
    with pytest.raises(ValueError, match="no piece 0"):
        forest.add_context(0, ids(1))
    prompt = forest.add_context(-1, ids(1))
    with pytest.raises(ValueError, match="what it answers"):
        turn(forest, -1, 1)
    short = np.zeros(1, np.float32)
    with pytest.raises(ValueError, match="for each token"):
        forest.add_turn(prompt, ids(1, 2), short, short, ids(0, 0), trained=True)
