"""What is read of a run: growing files, torn lines, resumes, new and pruned files of trees, crashed runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from watch_runs import append, contents, forked_tree, line, made_run, record, varied

from system.observe.lease import NAME
from system.observe.rundir import RunDirError
from system.scratch import sweep
from system.tree.store import TreeWriter
from system.watch import views
from system.watch.demo import unpacked
from system.watch.index import TreeIndex
from system.watch.index import load as load_tree
from system.watch.reader import RunReader
from system.watch.records import Records
from system.watch.status import Pulse, run_state
from system.watch.tail import JsonlTail
from system.watch.words import numbered, token_texts


@given(
    records=st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9))),
    cuts=st.lists(st.integers(0, 400), max_size=8),
)
def test_a_file_that_grows_by_any_pieces_is_read_once(
    records: list[dict[str, object]], cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tail") / "log.jsonl"
    whole = "".join(line(one) for one in records).encode()
    tail, read = JsonlTail(path), []
    read += tail.news()  # not there yet
    at = 0
    for cut in [*sorted(cuts), len(whole)]:
        with path.open("ab") as file:
            file.write(whole[at:cut])
        at = max(at, min(cut, len(whole)))
        assert not tail.restarted()
        read += tail.news()
    assert read == records
    assert tail.bad == 0


def test_a_torn_last_line_waits_and_a_bad_one_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    tail = JsonlTail(path)
    assert list(tail.news()) == [{"a": 1}]
    append(path, '2}\nnot json\n[3]\n{"a": 4}\n')
    assert list(tail.news()) == [{"a": 2}, {"a": 4}]
    assert tail.bad == 2


def test_a_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    tail = JsonlTail(path)
    assert not tail.restarted()
    assert len(list(tail.news())) == 2
    path.write_text('{"a": 9}\n')
    assert tail.restarted()
    assert list(tail.news()) == [{"a": 9}]


def test_a_resume_takes_back_what_is_past_its_checkpoint() -> None:
    records = Records()
    for step in range(1, 6):
        records.add(record(step))
    records.add({"resumed_from": 3, "time": 2000.0})
    records.add({**record(4), "rollout/reward": 0.9})
    step, _, reward = records.series("rollout/reward")
    assert step.tolist() == [1, 2, 3, 4]
    assert reward.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.9])
    assert records.step == 4
    assert records.latest["rollout/reward"] == 0.9


def test_a_record_that_is_none_is_left_out() -> None:
    records = Records()
    for odd in (
        {},
        {"step": "1", "time": 2.0},
        {"step": 1, "time": None},
        {"step": 1, "time": 2.0, "x": "y"},
    ):
        records.add(odd)
    assert len(records) == 1
    assert records.names() == []


def test_the_index_follows_files_that_come_and_go(tmp_path: Path) -> None:
    newest, sample = tmp_path / "trees", tmp_path / "trees-sample"
    index = TreeIndex((newest, sample))
    index.refresh()  # of nothing
    assert index.rows == {}
    writer = TreeWriter(newest, keep=4, flush_trees=2)
    for tree in varied(4):
        writer.append(tree)
    index.refresh()
    assert sorted(index.rows) == [0, 1, 2, 3]
    before = index.rows
    for tree in varied(4):
        writer.append(tree)
    index.refresh()
    assert sorted(index.rows) == [4, 5, 6, 7], "those that were pruned are forgotten"
    assert sorted(before) == [0, 1, 2, 3], "and who had the rows still has them"
    assert load_tree(index.rows[5]).prompt_id == "q1"
    assert index.waiting == 0


def test_the_index_reads_the_newest_first_and_stops_in_time(tmp_path: Path) -> None:
    with TreeWriter(tmp_path, flush_trees=1) as writer:
        for tree in varied(5):
            writer.append(tree)
    ticks = iter(range(1000))
    index = TreeIndex((tmp_path,), clock=lambda: float(next(ticks)))
    index.refresh(budget_s=2.0)
    assert sorted(index.rows) == [3, 4]
    assert index.waiting == 3
    index.refresh(budget_s=0.0)
    assert sorted(index.rows) == [2, 3, 4], "one file at least is read"


def test_a_damaged_file_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    with TreeWriter(tmp_path, flush_trees=1) as writer:
        for tree in varied(2):
            writer.append(tree)
    (tmp_path / "trees-000000000.parquet").write_bytes(b"PAR1 not parquet")
    index = TreeIndex((tmp_path,))
    index.refresh()
    assert sorted(index.rows) == [1]
    assert [path.name for path in index.problems] == ["trees-000000000.parquet"]


def test_what_the_index_knows_of_a_tree(tmp_path: Path) -> None:
    with TreeWriter(tmp_path) as writer:
        writer.append(forked_tree("q\x1b[2J", (1.0, 0.0)))
        writer.append(forked_tree("none", (math.nan, math.nan)))
    index = TreeIndex((tmp_path,))
    index.refresh()
    row = index.rows[0]
    assert row.prompt == "q␛[2J"
    assert (row.leaves, row.forks, row.depth, row.calls, row.tokens) == (2, 1, 4, 1, 16)
    assert (row.reward, row.spread, row.delta_h) == (0.5, 0.5, 0.125)
    assert (row.version_min, row.version_max, row.tools) == (3, 3, ("search",))
    assert math.isnan(index.rows[1].spread)


def test_nothing_is_written_to_a_run(tmp_path: Path) -> None:
    run = made_run(tmp_path, varied(3))
    (run.root / "curves").rmdir()
    before = contents(run.root)
    reader = RunReader(run.root)
    reader.refresh()
    reader.draw(1)
    reader.node_text(1, 1)
    views.overview(reader, run_state(run.root))
    assert contents(run.root) == before


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"no config\.yaml"):
        RunReader(tmp_path)
    with pytest.raises(RunDirError, match="not there"):
        RunReader(tmp_path / "x")


def test_a_run_of_settings_that_cannot_be_read_is_shown_without_advantages(tmp_path: Path) -> None:
    run = made_run(tmp_path, varied(1))
    run.config_path.write_text("learn: {no_such_setting: 1}\n")
    reader = RunReader(run.root)
    reader.refresh()
    assert "no_such_setting" in reader.draw(0)["problem"]
    assert np.isnan(reader.draw(0)["nodes"]["advantage"]).all()
    assert views.overview(reader, run_state(run.root))["problems"]


def state_of(root: Path, pid: int, host: str = "here", *, age: float = 0.0) -> str:
    (root / NAME).write_text(json.dumps({"host": host, "pid": pid}))
    now = (root / NAME).stat().st_mtime + age
    return run_state(root, Pulse(wall=lambda: now), host="here").state


def test_whether_it_runs_ended_or_is_lost(tmp_path: Path) -> None:
    root = made_run(tmp_path, []).root
    assert run_state(root).state == "stopped"
    assert state_of(root, os.getpid()) == "running"
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1, check=True)
    assert state_of(root, int(ended.stdout)) == "lost"
    assert state_of(root, 1, "elsewhere") == "running"
    assert state_of(root, 1, "elsewhere", age=60.0) == "lost", "its machine is silent"
    (root / NAME).write_text("")
    (root / "model").mkdir()
    (root / "summary.json").write_text("{}")
    assert run_state(root).state == "finished"
    (root / "summary.json").write_text('{"ended": false}')
    assert run_state(root).state == "stopped", "it went on from its end, and has that model"
    (root / "summary.json").write_text('{"ended": tr')
    assert run_state(root).state == "stopped"


@pytest.mark.parametrize("ahead_s", [-3600.0, 0.0, 3600.0])
def test_whether_it_runs_does_not_hang_on_two_clocks(tmp_path: Path, ahead_s: float) -> None:
    """The clock of the file server is ``ahead_s`` of this machine's."""
    root, now = made_run(tmp_path, []).root, 0.0
    wall = time.time()
    (root / NAME).write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    pulse = Pulse(lambda: now, lambda: wall + now)

    def look(beat_s: float) -> tuple[str, float | None]:
        """With the lease's last touch, and the last record, at that time of this machine's clock."""
        for name in (NAME, "metrics.jsonl"):
            os.utime(root / name, (wall + beat_s + ahead_s,) * 2)
        found = run_state(root, pulse, "here")
        return found.state, found.quiet_s

    for path in root.glob("*.json*"):
        os.utime(path, (0, 0))
    look(0.0)
    for now in range(10, 61, 10):
        assert look(float(now)) == ("running", 0.0)
    now = 90.0
    assert look(60.0) == ("running", 30.0)
    now = 96.0
    assert look(60.0) == ("lost", 36.0), "nobody has touched it since"


def test_notes_do_not_push_out_phases(tmp_path: Path) -> None:
    run = made_run(tmp_path, [])
    append(run.events_path, "".join(line({"time": 1004.0, "note": f"note {i}"}) for i in range(900)))
    reader = RunReader(run.root)
    reader.refresh()
    assert [one["phase"] for one in reader.phases] == ["training"]
    assert [reader.notes[i]["note"] for i in (0, -1)] == ["note 400", "note 899"]


@given(st.text(max_size=40))
def test_the_texts_of_tokens_are_the_text(text: str) -> None:
    """Bytes as tokens: a letter of several belongs to the last of them."""
    tokens = list(text.encode("utf-8", "replace"))
    pieces = token_texts(lambda ids: bytes(ids).decode("utf-8", "replace"), tokens)
    assert len(pieces) == len(tokens)
    plain = "".join(char for char in text.encode("utf-8", "replace").decode() if char.isalnum())
    assert "".join(char for char in "".join(pieces) if char.isalnum()) == plain
    assert token_texts(numbered, [7, 8]) == ["⟨7⟩", "⟨8⟩"]


def test_the_demo_is_nobody_elses_to_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of this machine removes temporary directories without an owner."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with unpacked() as demo:
        os.utime(demo.parent, (0, 0))
        assert sweep(tmp_path) == []
        reader = RunReader(demo)
        reader.refresh()
        assert len(reader.index.rows) > 100
        assert reader.records.step == 180
        assert not reader.problem
        assert run_state(demo).state == "finished"
    assert list(tmp_path.iterdir()) == []
