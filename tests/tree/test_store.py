from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from tree_strategies import forests, grow

from system.tree.record import ARRAYS, OPTIONAL, ToolCall, Tree, validate
from system.tree.routes import no_routes
from system.tree.store import SCHEMA, StoreError, TreeWriter, from_table, read_tree, read_trees, to_table


def _equal(left: Tree, right: Tree) -> None:
    for field in dataclasses.fields(Tree):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            assert a.tobytes() == b.tobytes()  # NaN included
        else:
            assert a == b


def _trees(count: int) -> list[Tree]:
    return [grow(seed, 20, first_token=1000 * seed)[0].close(float(seed)) for seed in range(count)]


@given(forests())
def test_round_trip_is_exact(trees: list[Tree]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        with TreeWriter(directory, flush_trees=2) as writer:
            for tree in trees:
                writer.append(tree)
        back = list(read_trees(directory))
    assert len(back) == len(trees)
    for left, right in zip(trees, back, strict=True):
        _equal(left, right)
        validate(right)


def test_files_of_before_later_columns_are_read() -> None:
    """Of trees whose turns were not scored when they ended, and that were not guided."""
    trees = _trees(4)
    later = {name: np.zeros(0, ARRAYS[name]) for name in OPTIONAL}
    table = to_table(trees).drop_columns([*OPTIONAL, "guide", "routes", "routes_shape"])
    assert any(tree.rescored and tree.answer_logprob.size for tree in trees)
    assert any(tree.routed for tree in trees)
    for tree, back in zip(trees, from_table(table), strict=True):
        _equal(dataclasses.replace(tree, **later, guide=0, routes=no_routes()), back)
        validate(back)


def test_calls_of_before_they_said_when_they_began_are_read() -> None:
    (tree,) = _trees(1)
    call = ToolCall(0, "search", {"q": "x"}, "ok", 0.5, began_s=1.5)
    table = to_table([dataclasses.replace(tree, calls=(call,))])
    assert [one.began_s for one in next(from_table(table)).calls] == [1.5]
    at, fields = table.schema.get_field_index("calls"), table.schema.field("calls").type.value_type
    before = pa.list_(pa.struct([one for one in fields if one.name != "began_s"]))
    ((row,),) = table["calls"].to_pylist()
    rows = [[{name: value for name, value in row.items() if name != "began_s"}]]
    old = table.set_column(at, "calls", pa.array(rows, before))
    assert [one.began_s for one in next(from_table(old)).calls] == [-1.0], "not known"


def test_numbers_of_many_experts_survive(tmp_path: Path) -> None:
    """They take two bytes each."""
    (tree,) = _trees(1)
    routes = np.arange(tree.n_tokens * 6, dtype=np.uint16).reshape(-1, 2, 3) * 100
    with TreeWriter(tmp_path) as writer:
        writer.append(dataclasses.replace(tree, routes=routes))
    (back,) = read_trees(tmp_path)
    assert back.routes.dtype == np.uint16
    np.testing.assert_array_equal(back.routes, routes)


def test_model_written_text_survives(tmp_path: Path) -> None:
    arguments = {"query": "naïve \ud800 \x00 'quote\"", "n": [1, 2.5, None, True]}
    meta = {"question": "日本 \ud800", "nested": {"a": [1, {"b": 2}]}}
    tree = dataclasses.replace(
        _trees(1)[0], calls=(ToolCall(0, "s\ud800arch", arguments, "rejected", 0.5, True, 3),), meta=meta
    )
    with TreeWriter(tmp_path) as writer:
        writer.append(tree)
    (back,) = read_trees(tmp_path)
    assert back.calls == (ToolCall(0, "s\\ud800arch", arguments, "rejected", 0.5, True, 3),)
    assert back.meta == meta


def test_other_tools_can_query_the_files(tmp_path: Path) -> None:
    trees = _trees(5)
    with TreeWriter(tmp_path, flush_trees=2) as writer:
        for tree in trees:
            writer.append(tree)
    table = pq.read_table(tmp_path)  # the whole directory, as pandas or DuckDB would
    assert table.schema.field("tokens").type == pa.list_(pa.int32())
    assert table["number"].to_pylist() == list(range(5))
    assert table["tokens"].to_pylist() == [t.tokens.tolist() for t in trees]
    assert pa.types.is_struct(table.schema.field("calls").type.value_type)
    assert pc.list_value_length(table["reward"]).to_pylist() == [t.n_leaves for t in trees]
    assert table.schema.metadata == {b"espalier.schema": b"1"}


def test_only_the_newest_files_are_kept_and_a_new_writer_goes_on(tmp_path: Path) -> None:
    trees = _trees(11)
    with TreeWriter(tmp_path, keep=4, flush_trees=2) as writer:
        for tree in trees[:7]:
            writer.append(tree)
    assert [t.prompt_id for t in read_trees(tmp_path)] == [f"prompt-{i}" for i in (2, 3, 4, 5, 6)]
    (tmp_path / ".trees-000000099.partial").write_bytes(b"half a file")
    with TreeWriter(tmp_path, keep=4, flush_trees=2) as writer:
        for tree in trees[7:]:
            writer.append(tree)
    assert [t.prompt_id for t in read_trees(tmp_path)] == [f"prompt-{i}" for i in (7, 8, 9, 10)]
    assert pq.read_table(tmp_path)["number"].to_pylist() == [7, 8, 9, 10]
    assert not list(tmp_path.glob(".*"))


def test_a_write_that_fails_shows_nothing_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = TreeWriter(tmp_path, flush_trees=2)
    first, second = _trees(2)
    writer.append(first)
    with monkeypatch.context() as patch:

        def full(_: int) -> None:
            raise OSError("no space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            writer.append(second)
    assert list(read_trees(tmp_path)) == []
    writer.flush()
    assert [tree.prompt_id for tree in read_trees(tmp_path)] == ["prompt-0", "prompt-1"]


def test_a_torn_file_is_set_aside_by_the_next_writer(tmp_path: Path) -> None:
    with TreeWriter(tmp_path, flush_trees=1) as writer:
        for number in range(3):
            writer.append(grow(number, 5)[0].close(1.0))
    newest = sorted(tmp_path.glob("*.parquet"))[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    with TreeWriter(tmp_path, flush_trees=1) as writer:
        writer.append(grow(7, 5)[0].close(1.0))
    assert len(list(read_trees(tmp_path))) == 3
    assert newest.with_name(f"{newest.name}.damaged").is_file()


def test_a_file_damaged_within_is_named(tmp_path: Path) -> None:
    """Arrow tells of some damage as an error of the system, without the file's name."""
    with TreeWriter(tmp_path) as writer:
        writer.append(grow(5, 5)[0].close(1.0))
    (file,) = tmp_path.iterdir()
    whole, inside = file.read_bytes(), b"ARROW:schema"
    at = whole.index(inside) + len(inside) + 10
    file.write_bytes(whole[:at] + b"A" * 50 + whole[at + 50 :])
    for read in (lambda: list(read_trees(tmp_path)), lambda: read_tree([tmp_path], 0)):
        with pytest.raises(StoreError, match=file.name):
            read()


def test_keeping_none_writes_nothing(tmp_path: Path) -> None:
    with TreeWriter(tmp_path, keep=0, flush_trees=1) as writer:
        writer.append(_trees(1)[0])
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "trees-000000000.parquet"
    pq.write_table(pa.table({"a": [1]}), file)
    with pytest.raises(StoreError, match="schema missing"):
        list(read_trees(tmp_path))
    later = SCHEMA.with_metadata({b"espalier.schema": b"2"})
    pq.write_table(later.empty_table(), file)
    with pytest.raises(StoreError, match="schema 2; this version reads 1"):
        list(read_trees(tmp_path))
    file.write_bytes(b"not parquet")
    with pytest.raises(StoreError, match="not a readable Parquet file"):
        list(read_trees(tmp_path))
    with pytest.raises(ValueError, match="keep=-2"):
        TreeWriter(tmp_path, keep=-2)


_ENDLESS = """
import sys
sys.path.insert(0, sys.argv[2])
from tree_strategies import grow
from system.tree.store import TreeWriter
writer = TreeWriter(sys.argv[1], flush_trees=1)
seed = 0
while True:
    writer.append(grow(seed, 10)[0].close(0.0))
    seed += 1
"""


def test_reading_while_a_writer_runs_and_after_it_is_killed(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    writer = subprocess.Popen(
        [sys.executable, "-c", _ENDLESS, str(tmp_path), str(Path(__file__).parent)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        give_up = time.monotonic() + 60
        while len(list(read_trees(tmp_path))) < 5:
            assert writer.poll() is None, "the writer died"
            assert time.monotonic() < give_up, "the writer writes nothing"
            time.sleep(0.01)
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait(timeout=10)
    survivors = [tree.prompt_id for tree in read_trees(tmp_path)]
    assert survivors == [f"prompt-{seed}" for seed in range(len(survivors))]
    with TreeWriter(tmp_path) as after:
        after.append(_trees(1)[0])
    assert len(list(read_trees(tmp_path))) == len(survivors) + 1
