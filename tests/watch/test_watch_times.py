"""What the time of a tree's nodes went into, from what the tree recorded."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from watch_runs import timed_tree

from system.tree.builder import TreeBuilder
from system.tree.record import Kind, Origin, Outcome, Tree
from system.watch.drawing import drawing
from system.watch.times import CAUSES, Stretch, scored, times

sys.path.append(str(Path(__file__).resolve().parents[1] / "tree"))
from tree_strategies import forests


def found(tree: Tree) -> list[list[Stretch]]:
    told = times(tree)
    assert told is not None
    return [[(round(begin, 4), round(end, 4), cause) for begin, end, cause in one] for one in told.stretches]


def test_causes_of_waiting_that_can_be_counted_by_hand() -> None:
    tree = timed_tree()
    assert found(tree) == [
        [],
        [(0.0, 0.5, "waiting"), (0.5, 1.0, "engine")],
        [(1.0, 1.1, "barrier"), (1.1, 1.35, "tool"), (1.35, 1.5, "barrier")],
        [(1.5, 1.75, "barrier"), (1.75, 1.9, "waiting"), (1.9, 2.0, "engine")],
        [(2.2, 2.4, "waiting"), (2.4, 2.5, "engine")],  # a fork: before that it was not there
    ]
    drawn: dict[str, Any] = drawing(tree, np.zeros(2), np.zeros(5))["times"]
    assert drawn["over"] == [0.0, 1.0, 1.5, 2.0, 2.5]
    assert [CAUSES[cause] for _, _, cause in drawn["stretches"][2]] == ["barrier", "tool", "barrier"]


def test_a_tree_of_an_older_version_has_no_times() -> None:
    nothing = np.zeros(0, np.float32)
    tree = replace(timed_tree(), opened_s=nothing, first_s=nothing, last_s=nothing)
    assert times(tree) is None
    assert drawing(tree, np.zeros(2), np.zeros(5))["times"] is None


def test_a_call_of_which_nobody_knows_when_it_was_made_has_all_the_time_before_its_answer() -> None:
    tree = timed_tree()
    tree = replace(tree, calls=(replace(tree.calls[0], began_s=-1.0),))
    assert found(tree)[2] == [(1.0, 1.5, "tool")]


def test_when_the_run_was_away_nothing_was_waited_for() -> None:
    tree = replace(timed_tree(), meta={"away_s": [[0.7, 1.2]], "scored_s": [None, [2.5, 2.75]]})
    assert found(tree)[1:3] == [
        [(0.0, 0.5, "waiting"), (0.5, 0.7, "engine"), (0.7, 1.0, "away")],
        [(1.0, 1.1, "away"), (1.1, 1.2, "away"), (1.2, 1.35, "tool"), (1.35, 1.5, "barrier")],
    ]
    assert scored(tree) == [None, (2.5, 2.75)]
    assert scored(replace(tree, meta={})) == [None, None]


def test_a_clock_that_was_set_back_makes_no_time_negative() -> None:
    tree = timed_tree()
    tree = replace(tree, last_s=np.array([np.nan, 1.0, 0.2, 2.0, 2.5], np.float32))
    assert all(begin < end for one in found(tree) for begin, end, _ in one)


def test_parts_of_a_turn_that_others_go_on_inside_share_its_time_by_tokens() -> None:
    now = 10.0
    growth = TreeBuilder("p", "t", [1, 2], budget=2, started_s=10.0, clock=lambda: now)
    turn = growth.node(growth.prompt, Kind.MODEL)
    now = 11.0
    growth.extend(turn, [3, 4], -0.5, 0.5, 1)
    now = 13.0
    growth.extend(turn, [5, 6, 7, 8], -0.5, 0.5, 1)
    growth.leaf(turn, Outcome.STOPPED, Origin.ROOT)
    now = 15.0
    again = growth.node(turn, Kind.MODEL, 5)  # behind its third token
    now = 16.0
    growth.extend(again, [9], -0.5, 0.5, 1)
    growth.leaf(again, Outcome.STOPPED, Origin.FORK)
    assert found(growth.close(17.0)) == [
        [],
        [(0.0, 1.0, "waiting"), (1.0, 2.0, "engine")],
        [(2.0, 3.0, "engine")],
        [(5.0, 6.0, "waiting")],
    ]


@given(forests())
def test_stretches_follow_one_another_and_end_with_their_nodes(forest: list[Tree]) -> None:
    for tree in forest:
        told = times(tree)
        assert (told is None) == (not tree.timed)
        if told is None:
            continue
        assert len(told.stretches) == len(told.over) == tree.n_nodes
        for node in range(1, tree.n_nodes):
            parts = told.stretches[node]
            assert all(begin < end for begin, end, _ in parts)
            assert all(one[1] <= other[0] for one, other in pairwise(parts))
            assert {cause for *_, cause in parts} <= set(CAUSES)
            assert told.over[node] == (parts[-1][1] if parts else told.over[tree.parent[node]])
            if np.isfinite(tree.last_s[node]) and tree.kind[node] == Kind.MODEL and parts:
                assert told.over[node] == pytest.approx(max(tree.last_s[node], parts[-1][1]))
