"""Trees in flight on disk: whole or not at all, and exactly what they were."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rollout_fakes import PROMPT, Segment, make_world

from system.rollout.branching import Never
from system.rollout.in_flight import SavedTree, SavedTrees, SavedTreesError, read, write
from system.rollout.tree_rollout import TreeRollout
from system.tree.record import Tree
from system.twin.clock import run


def closed_tree() -> Tree:
    world = make_world(lambda text, rng: Segment("<answer> x </answer>"), policy=Never(4), leaves=3, roots=3)
    return run(TreeRollout(world.context, PROMPT, seed=1).run())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tree = closed_tree()
    trees = (
        SavedTree(0, "p1", 4, tree),
        SavedTree(2, "q \udc80", 5, b"\x00snapshot"),
        SavedTree(0, "p3", 6, tree),
    )
    path = tmp_path / "v000006.trees"
    for _ in range(2):  # the second replaces the first
        write(path, SavedTrees({"rollout": {"leaves": 3}}, {"step": 6}, trees))
    found = read(path)
    assert (found.fingerprint, found.books) == ({"rollout": {"leaves": 3}}, {"step": 6})
    saved = [(one.epoch, one.prompt_id, one.start_version, isinstance(one.tree, Tree)) for one in found.trees]
    assert saved == [
        (0, "p1", 4, True),
        (0, "p3", 6, True),
        (2, "q \udc80", 5, False),
    ]
    for one in found.trees[:2]:
        assert isinstance(one.tree, Tree)
        for name in ("tokens", "logprob", "entropy", "version", "reward", "leaf", "parent"):
            np.testing.assert_array_equal(getattr(one.tree, name), getattr(tree, name))
        assert one.tree.meta == tree.meta
    assert found.trees[2].tree == b"\x00snapshot"
    assert [file.name for file in tmp_path.iterdir()] == ["v000006.trees"]


def test_no_trees_at_all(tmp_path: Path) -> None:
    write(tmp_path / "x.trees", SavedTrees({}, {}, ()))
    assert read(tmp_path / "x.trees").trees == ()


@pytest.mark.parametrize("damage", ["empty", "cut", "other"])
def test_a_damaged_file_says_so(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "v1.trees"
    write(path, SavedTrees({}, {}, (SavedTree(0, "p1", 0, b"snapshot"),)))
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "other": b"not a zip file" * 50}[damage])
    with pytest.raises(SavedTreesError, match=r"v1\.trees"):
        read(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), tail=st.booleans())
def test_no_flipped_bit_raises_anything_else(tmp_path: Path, where: float, bit: int, tail: bool) -> None:
    """``tail``: in the directory of the zip file, where most of its fields stand."""
    path = tmp_path / "v000006.trees"
    if not path.exists():
        write(path, SavedTrees({}, {"step": 6}, (SavedTree(2, "q", 5, bytes(40)),)))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    first = len(whole) - 400 if tail else 0
    damaged[first + int(where * (len(whole) - first))] ^= 1 << bit
    try:
        path.write_bytes(damaged)
        with contextlib.suppress(SavedTreesError):
            read(path)
    finally:
        path.write_bytes(whole)
