"""What is damaged in a run's directory, or means harm there: the rest of it is shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_watch_server import Page
from watch_runs import append, line, made_run, record, varied

from system.observe.lease import NAME
from system.tree.store import StoreError, TreeWriter, write_file
from system.watch import views
from system.watch.demo import unpacked
from system.watch.index import TreeIndex
from system.watch.index import load as load_tree
from system.watch.reader import RunReader
from system.watch.server import start
from system.watch.words import decoder

HUGE = int("9" * 400)  # no float holds it


@pytest.mark.parametrize(
    "odd",
    [
        line({"step": 6, "time": 1006.0, "rollout/reward": HUGE}),
        line({"step": 6, "time": HUGE, "rollout/reward": 1.0}),
        line({"step": HUGE, "time": 1006.0, "rollout/reward": 1.0}),
        line({"step": 6, "time": 1006.0, "a\ud800": 1.0}),
        line({"step": 6, "time": 1006.0, "eval/which": "after", "eval/set/\ud800/accuracy": 1.0}),
        "[" * 100_000 + "\n",
        '{"a":' * 100_000 + "\n",
    ],
    ids=["value", "time", "step", "name", "set", "lists", "objects"],
)
def test_a_record_that_cannot_be_shown_spoils_no_other(tmp_path: Path, odd: str) -> None:
    run = made_run(tmp_path, varied(1))
    append(run.metrics_path, odd + line(record(7)))
    about = shown(RunReader(run.root))
    assert about["overview"]["step"] == 7
    assert "rollout/reward" in about["curves"]


@pytest.mark.parametrize(
    "time", [HUGE, int("9" * 40), "\ud800", {"a": 1}], ids=["huge", "64 bits", "half", "dict"]
)
def test_an_event_of_an_odd_time_is_told(tmp_path: Path, time: object) -> None:
    run = made_run(tmp_path, varied(1))
    append(run.events_path, line({"note": "odd", "time": time}) + line({"phase": "odd", "time": time}))
    assert shown(RunReader(run.root))["overview"]["notes"][-1]["text"] == "odd"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (NAME, '{"host": "a", "pid": 1e400}'),
        (NAME, '{"host": "\\ud800", "pid": 1}'),
        (NAME, "[" * 100_000),
        ("summary.json", "[" * 100_000),
        ("summary.json", '{"causes": {"a\\ud800": {"count": "\\ud800", "first": 3}}}'),
    ],
)
def test_a_file_that_says_nonsense_is_passed_over(tmp_path: Path, name: str, text: str) -> None:
    run = made_run(tmp_path, varied(1))
    (run.root / name).write_text(text)
    assert shown(RunReader(run.root))["overview"]["step"] == 5


def shown(reader: RunReader) -> dict[str, Any]:
    """What the pages get of it, through JSON."""
    reader.refresh()
    found = {
        "overview": views.overview(reader, reader.state()),
        "curves": views.curves(reader.records, reader.records.names()),
        "timeline": views.timeline(reader),
        "evaluation": views.evaluation(reader),
    }
    return json.loads(orjson.dumps(found, option=orjson.OPT_SERIALIZE_NUMPY))


def disordered(table: pa.Table) -> pa.Table:
    """Its nodes hang on nodes that there are not."""
    at = table.schema.get_field_index("parent")
    return table.set_column(
        at, table.schema.field(at), pa.array([[-1, 0, 1, 2, 99]], table.schema.field(at).type)
    )


def emptied(table: pa.Table) -> pa.Table:
    """It has a null in place of its rewards."""
    at = table.schema.get_field_index("reward")
    return table.set_column(at, table.schema.field(at), pa.array([None], table.schema.field(at).type))


@pytest.mark.parametrize("damage", [disordered, emptied])
def test_a_tree_of_nonsense_hides_no_older_one(
    tmp_path: Path, damage: Callable[[pa.Table], pa.Table]
) -> None:
    with TreeWriter(tmp_path, flush_trees=1) as writer:
        for tree in varied(2):
            writer.append(tree)
    write_file(tmp_path, 1, damage(pq.read_table(tmp_path / "trees-000000001.parquet")))
    index = TreeIndex((tmp_path,))
    index.refresh()
    assert sorted(index.rows) == [0]
    assert [path.name for path in index.problems] == ["trees-000000001.parquet"]


def test_a_footer_of_nonsense_does_not_end_the_process(tmp_path: Path) -> None:
    """It says that a column always has a value, where its figures say otherwise: pyarrow aborts, if asked."""
    with TreeWriter(tmp_path, flush_trees=1) as writer:
        writer.append(varied(1)[0])
    (file,) = tmp_path.iterdir()
    whole, optional = file.read_bytes(), b"\x25\x02\x18\x04meta"
    assert whole.count(optional) == 1
    file.write_bytes(whole.replace(optional, b"\x25\x00\x18\x04meta"))
    index = TreeIndex((tmp_path,))
    index.refresh()
    assert len(index.rows) + len(index.problems) == 1
    for row in index.rows.values():
        with pytest.raises(StoreError, match=file.name):
            load_tree(row)


def test_a_tokenizer_that_is_half_there_gives_way_to_the_next(tmp_path: Path) -> None:
    with unpacked() as demo:
        shutil.copytree(demo / "model", tmp_path / "whole")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "tokenizer.json").write_text('{"version": ')
    decode, whole = decoder([tmp_path / "half", tmp_path / "whole"]), decoder([tmp_path / "whole"])
    assert decode is not None
    assert whole is not None
    assert decode([7, 8]) == whole([7, 8])
    assert decoder([tmp_path / "half"]) is None


async def test_the_number_of_a_run_is_a_short_one(tmp_path: Path) -> None:
    server, address = await start([made_run(tmp_path, []).root])
    async with aiohttp.ClientSession() as session:
        status, _, _ = await Page(address, session).get(f"/api/runs/{'9' * 5000}/overview")
    await server.close()
    assert status == 404
