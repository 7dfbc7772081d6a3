"""Filters, curves, the timeline and the drawing: pure functions."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from watch_runs import append, forked_tree, line, made_run, varied

from system.config import Config, ConfigError
from system.tree.record import Tree, token_node
from system.watch import views
from system.watch.drawing import BINS, bins, drawing, lanes
from system.watch.index import TreeIndex, TreeRow
from system.watch.query import NUMBERS, TreeFilter, thinned
from system.watch.reader import RunReader, advantages

sys.path.append(str(Path(__file__).resolve().parents[1] / "tree"))
from tree_strategies import forests

ROW = TreeRow(
    0, "p", "calc", ("search",), 2, 1, 4, 1, 16, 0.5, 0.5, 1, 2, 0.1, 3, 3, 10.0, 12.0, Path("f"), 0
)  # fmt: skip
numbers = st.floats(allow_nan=True, allow_infinity=False, width=32)
rows = st.lists(
    st.builds(
        replace,
        st.just(ROW),
        number=st.integers(0, 99),
        task=st.sampled_from(["calc", "lookup"]),
        tools=st.sampled_from([(), ("search",), ("python", "search")]),
        spread=numbers,
        delta_h=numbers,
        depth=st.integers(1, 9),
    ),
    max_size=12,
)


@given(rows=rows, least=numbers, sort=st.sampled_from([*NUMBERS, *(f"-{name}" for name in NUMBERS)]))
def test_a_filter_keeps_exactly_those_that_pass_in_order(
    rows: list[TreeRow], least: float, sort: str
) -> None:
    asked = {"sort": sort, "tool": "search", "task": "calc"}
    if math.isfinite(least):
        asked["spread_min"] = repr(least)
    chosen = TreeFilter.of(asked).chosen(rows)
    passes = [
        row
        for row in rows
        if row.task == "calc" and "search" in row.tools and (not math.isfinite(least) or row.spread >= least)
    ]
    assert sorted(map(id, chosen)) == sorted(map(id, passes))
    key = NUMBERS[sort.removeprefix("-")]
    values = [key(row) for row in chosen]
    known = [value for value in values if math.isfinite(value)]
    assert values[: len(known)] == pytest.approx(known), "those that are not known come last"
    assert known == sorted(known, reverse=sort.startswith("-"))


@pytest.mark.parametrize(
    "asked",
    [{"spread_min": "x"}, {"spread_min": "nan"}, {"colour": "1"}, {"sort": "prompt"}, {"task_min": "1"}],
)
def test_a_filter_that_is_none_is_refused(asked: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        TreeFilter.of(asked)


@given(st.lists(numbers, max_size=300), st.integers(1, 40))
def test_a_thinned_curve_keeps_the_mean_and_the_extremes(values: list[float], most: int) -> None:
    points = thinned(np.arange(len(values)), np.array(values, np.float64), most)
    known = [value for value in values if math.isfinite(value)]
    assert len(points) == min(most, len(known))
    if known:
        assert min(low for _, _, low, _ in points) == min(known)
        assert max(high for *_, high in points) == max(known)
        assert all(
            low <= mean + 1e-6 * abs(mean) and mean <= high + 1e-6 * abs(mean)
            for _, mean, low, high in points
        )
        assert points[-1][0] == max(i for i, value in enumerate(values) if math.isfinite(value))


@given(forests())
def test_lanes_do_not_cross_and_every_branch_has_one(forest: list[Tree]) -> None:
    for tree in forest:
        lane = lanes(tree.parent)
        children = [np.flatnonzero(tree.parent == node) for node in range(tree.n_nodes)]
        for node, below in enumerate(children):
            if below.size:
                assert lane[below[0]] == lane[node], "a branch goes on in its lane"
        ends = [node for node, below in enumerate(children) if not below.size]
        assert sorted(lane[ends].tolist()) == list(range(len(ends))), "and nobody else ends there"
        assert [lane[node] for node in ends] == sorted(lane[ends].tolist())


@given(forests(), st.integers(1, 7))
def test_stretches_cover_every_token_once_and_stay_in_their_nodes(forest: list[Tree], width: int) -> None:
    for tree in forest:
        length = np.diff(tree.start, append=tree.n_tokens)
        first, number = bins(tree.start, length, width)
        size = np.diff(first, append=tree.n_tokens)
        assert first[0] == 0
        assert (size >= 1).all()
        assert (size <= width).all()
        node = token_node(tree)
        assert (node[first] == node[first + size - 1]).all()
        assert (first[number] == tree.start).all()


def test_the_drawing_of_a_tree_that_can_be_counted_by_hand() -> None:
    tree = forked_tree()
    drawn = drawing(tree, *advantages(tree, Config()))
    nodes = drawn["nodes"]
    assert nodes["begin"].tolist() == [-4, 0, 3, 5, 5]
    assert nodes["length"].tolist() == [4, 3, 2, 2, 5]
    assert nodes["lane"].tolist() == [0, 0, 0, 0, 1]
    assert nodes["leaves"].tolist() == [2, 2, 2, 1, 1]
    assert nodes["advantage"][3] == -nodes["advantage"][4] > 0
    assert nodes["advantage"][2] == 0, "the mean over both"
    assert drawn["bin_tokens"] == 1
    assert [leaf["outcome"] for leaf in drawn["leaves"]] == ["stopped", "length"]
    decided = {"node": 2, "delta_h": 0.125, "probability": 0.525, "draw": 0.31}
    assert drawn["forks"] == [{**decided, "forks": 1, "scheduled": 0}]
    assert drawn["meta"] == {"question": "Who wrote it?", "gold": "Ada"}


def test_a_large_tree_is_drawn_from_few_numbers() -> None:
    """One prompt, one branch of a million tokens."""
    tree, size = forked_tree(), 1_000_000
    big = replace(
        tree,
        **{
            name: np.resize(getattr(tree, name), size) for name in ("tokens", "logprob", "entropy", "version")
        },
        start=np.array([0, 4, 7, 9, 11], np.int32),
    )
    drawn = drawing(big, np.zeros(2), np.zeros(5))
    assert drawn["bins"]["entropy"].size <= BINS + tree.n_nodes
    assert np.nanmax(drawn["bins"]["entropy"]) <= 1.5


def test_shares_are_spread_over_time() -> None:
    edges = np.array([0.0, 1.0, 2.0, 3.0])
    shares = views.spread_over(np.array([1.5, 3.0]), np.array([1.5, 0.5]), np.array([0.5, 1.0]), edges)
    assert shares == pytest.approx([0.5, 0.5, 1.0])
    assert views.spread_over(np.array([1.0]), np.array([1.0]), np.array([0.5]), edges) == [0.5, None, None]


@given(
    st.lists(
        st.tuples(st.floats(0.0, 50.0), st.floats(0.0, 9.0), st.floats(0.0, 1.0) | st.just(math.nan)),
        max_size=30,
    ),
    st.integers(1, 12),
)
def test_shares_over_time_equal_a_sum_over_records(
    records: list[tuple[float, float, float]], bars: int
) -> None:
    edges = 1.7e9 + np.linspace(10.0, 40.0, bars + 1)  # unix times
    rows = [(1.7e9 + end, length, share) for end, length, share in records]
    found = views.spread_over(*np.array(rows, np.float64).reshape(-1, 3).T, edges)
    for low, high, one in zip(edges[:-1], edges[1:], found, strict=True):
        parts = [
            (max(0.0, min(high, end) - max(low, end - length)), share)
            for end, length, share in rows
            if share == share
        ]
        told = sum(part for part, _ in parts)
        if told == 0:
            assert one is None
        elif told > 1e-3:
            assert one == pytest.approx(sum(part * share for part, share in parts) / told, abs=1e-4)


def test_phases_that_are_too_short_to_be_seen_become_one() -> None:
    names = ("warm start", "training", "evaluating", "training", "saving")
    phases = list(zip((0.0, 50.0, 50.5, 50.6, 60.0), names, strict=True))
    assert views.merged(phases, 60.2, 1.0) == [
        (0.0, "warm start"),
        (50.0, "training, evaluating"),
        (60.0, "saving"),
    ]
    assert views.merged(phases, 60.2, 0.0) == phases
    assert views.merged([], 1.0, 1.0) == []


def test_trees_of_another_clock_are_counted_and_not_drawn(tmp_path: Path) -> None:
    late = replace(forked_tree("late"), started_s=9000.0, closed_s=9001.0)
    run = made_run(tmp_path, [*varied(3), late])
    append(run.events_path, line({"time": 1020.0, "phase": "saving"}))
    reader = RunReader(run.root)
    reader.refresh()
    timeline = views.timeline(reader)
    assert [number for number, *_ in timeline["trees"]] == [0, 1, 2]
    assert timeline["outside"] == 1
    assert timeline["span"] == [999.0, 1020.0], "a phase that has just begun is seen"


def test_the_pages_of_a_run(tmp_path: Path) -> None:
    reader = RunReader(made_run(tmp_path, varied(6)).root)
    reader.refresh()
    timeline = views.timeline(reader, bars=4)
    assert [actor["name"] for actor in timeline["actors"]] == ["engine-0", "learner"]
    assert timeline["phases"] == [{"time": 999.0, "phase": "training"}]
    assert timeline["span"] == [999.0, 1010.0]
    held_out, aime = views.evaluation(reader)["sets"]
    (point,) = held_out["curves"]["all"]
    assert (point["accuracy"], point["low"], point["high"], point["questions"]) == (0.25, 0.07, 0.59, 8)
    assert aime["name"] == "aime"
    assert {kind: one[0]["accuracy"] for kind, one in aime["curves"].items()} == {"all": 0.5, "calc": 0.75}
    assert aime["curves"]["all"][0]["low"] is None
    listed = views.tree_list(reader, TreeFilter.of({"spread_min": "0.3", "sort": "-spread"}))
    assert [row["number"] for row in listed["rows"]] == [5, 0, 1]
    assert listed["tools"] == ["python", "search", "unknown"]
    assert views.curves(reader.records, ["rollout/reward", "x"])["x"] == []


def test_every_row_of_the_index_can_be_listed(tmp_path: Path) -> None:
    run = made_run(tmp_path, varied(4))
    index = TreeIndex(run.tree_directories)
    index.refresh()
    assert {row.number for row in TreeFilter().chosen(index.rows.values())} == set(index.rows)
