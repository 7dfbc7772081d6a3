"""The sample of a run's trees: what stays does not depend on when it was looked at."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from system.tree.sample import SampleWriter, kept
from system.tree.store import TreeWriter, numbered_trees, read_tree, read_trees

sys.path.append(str(Path(__file__).resolve().parents[1] / "watch"))
from watch_runs import forked_tree

spreads = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=200)


@given(spreads, st.integers(1, 9), st.lists(st.integers(0, 200), max_size=5))
def test_what_is_kept_is_the_same_whenever_it_is_thinned(
    spread: list[float], most: int, cuts: list[int]
) -> None:
    everything = dict(enumerate(spread))
    held: dict[int, float] = {}
    at = 0
    for cut in [*sorted(cuts), len(spread)]:
        held |= {number: everything[number] for number in range(at, min(cut, len(spread)))}
        held = {number: held[number] for number in kept(held, most)}
        at = max(at, min(cut, len(spread)))
    assert held.keys() == kept(everything, most)


@given(spreads, st.integers(1, 9))
def test_it_spans_the_run_and_holds_the_largest_spread(spread: list[float], most: int) -> None:
    found = kept(dict(enumerate(spread)), most)
    assert len(found) <= 2 * most
    if spread:
        assert 0 in found
        assert max(spread) == max(spread[number] for number in found)
        length = min(2**k for k in range(9) if (len(spread) - 1) // 2**k < most)
        assert {number // length for number in found} == {number // length for number in range(len(spread))}
        assert set(range(0, len(spread), length)) <= found
    assert kept(dict(enumerate(spread)), 0) == set()


def test_a_writer_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    values = [0.5, 0.0, 1.0, 0.0, 0.0, 0.0, 0.25, 0.0]
    for number, spread in enumerate(values):
        writer = SampleWriter(tmp_path, 2)
        if number in writer.wanted({number: spread}):
            writer.add(number, forked_tree(), spread)
    assert SampleWriter(tmp_path, 2).spread == {0: 0.5, 2: 1.0, 4: 0.0, 6: 0.25}
    assert len(list(read_trees(tmp_path))) == 4
    assert read_tree((tmp_path / "none", tmp_path), 6) is not None
    assert read_tree((tmp_path,), 7) is None
    assert [number for number, _ in numbered_trees(tmp_path / "none", tmp_path)] == [0, 2, 4, 6]
    with TreeWriter(tmp_path / "newest", keep=3, flush_trees=1) as newest:
        for _ in range(8):
            newest.append(forked_tree())
    found = [number for number, _ in numbered_trees(tmp_path / "newest", tmp_path)]
    assert found == [0, 2, 4, 5, 6, 7], "each once, by the number that it has in the run"
    assert pq.read_table(tmp_path / "trees-000000006.parquet")["number"].to_pylist() == [6]


def test_a_new_writer_reads_only_files_that_it_has_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        SampleWriter(tmp_path, 4).add(number, forked_tree(), number / 2)
    read: list[str] = []
    whole = pq.read_metadata

    def counted(path: Path) -> object:
        read.append(path.name)
        return whole(path)

    monkeypatch.setattr(pq, "read_metadata", counted)
    SampleWriter(tmp_path, 4).add(1, forked_tree(), 1.0)  # another tree under a number that was there
    read.clear()
    assert SampleWriter(tmp_path, 4).spread == {0: 0.0, 1: 1.0, 2: 1.0}
    assert SampleWriter(tmp_path, 4).spread == {0: 0.0, 1: 1.0, 2: 1.0}
    assert read == ["trees-000000001.parquet"]
