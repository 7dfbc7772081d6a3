"""Data files: ARPO's released columns, the plain form, and errors that say where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from system.config import Config, ConfigError
from system.tasks.jsonl import DataError, JsonlTask, read_prompts, repair

RELEASED = {
    "data_source": "hotpotqa",
    "prompt": [
        {"content": "Answer with \x08oxed{answer here}.", "role": "system"},
        {"content": "Who wrote Dusk?", "role": "user"},
    ],
    "ability": "qa",
    "reward_model": {"ground_truth": ["Alda", "Alda M."], "style": "rule"},
    "extra_info": {"index": 0, "need_tools_kwargs": False, "question": "Who wrote Dusk?", "split": "train"},
    "metadata": None,
}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_released_columns_from_jsonl_and_parquet(tmp_path: Path):
    math_row = RELEASED | {
        "ability": "math",
        "reward_model": {"ground_truth": ["\x08oxed{5}"], "style": "rule"},
    }
    rows = [RELEASED, math_row]
    write(tmp_path / "data.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    for name in ("data.jsonl", "data.parquet"):
        first, second = read_prompts(tmp_path / name)
        assert first.messages == (
            {"role": "system", "content": "Answer with \\boxed{answer here}."},
            {"role": "user", "content": "Who wrote Dusk?"},
        )
        assert first.answers == ("Alda", "Alda M.")
        assert (first.kind, second.kind) == ("qa", "math")
        assert second.answers == ("\\boxed{5}",)
        assert first.extra["data_source"] == "hotpotqa"
        assert first.extra["extra_info"]["question"] == "Who wrote Dusk?"
        assert (first.id, second.id) == ("data/1", "data/2")
        json.dumps(first.extra)


def test_ground_truth_as_one_text(tmp_path: Path):
    row = RELEASED | {"reward_model": {"ground_truth": "42", "style": "rule"}}
    assert read_prompts(write(tmp_path / "d.jsonl", [row]))[0].answers == ("42",)


def test_only_the_backspace_of_boxed_is_repaired():
    assert repair("a\x08oxed{1} b\x08 c") == "a\\boxed{1} b\x08 c"
    assert repair({"x": ["\x08oxed{}", 3]}) == {"x": ["\\boxed{}", 3]}


def test_plain_form_and_system_prompt(tmp_path: Path):
    rows = [
        {"question": "2+2?", "answer": 4},
        {"id": "q2", "question": "Capital?", "answer": ["Rome", "Roma"], "kind": "geo"},
    ]
    first, second = read_prompts(write(tmp_path / "d.jsonl", rows), system_prompt="Be brief.")
    assert first.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
    )
    assert (first.id, first.answers, first.kind) == ("d/1", ("4",), "default")
    assert (second.id, second.answers, second.kind) == ("q2", ("Rome", "Roma"), "geo")


def test_a_system_prompt_replaces_the_rows_own(tmp_path: Path):
    (prompt,) = read_prompts(write(tmp_path / "d.jsonl", [RELEASED]), system_prompt="Mine.")
    assert [m["content"] for m in prompt.messages] == ["Mine.", "Who wrote Dusk?"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"row 2: expected a column `prompt` .* found: text"),
        ({"question": " ", "answer": "x"}, "row 2, column question"),
        ({"question": "x"}, "row 2: column answer is missing"),
        ({"question": "x", "answer": ""}, "row 2, column answer: empty"),
        ({"question": "x", "answer": []}, "row 2, column answer: empty"),
        (
            {"question": "x", "answer": {"a": 1}},
            "row 2, column answer: expected a text or a number, found dict",
        ),
        ({"question": "x", "answer": True}, "row 2, column answer: .* found bool"),
        (RELEASED | {"prompt": "Who?"}, "row 2, column prompt: expected a list"),
        (RELEASED | {"prompt": [{"content": "x"}]}, r"row 2, column prompt\[0\]"),
        (RELEASED | {"reward_model": None}, "row 2, column reward_model"),
        (RELEASED | {"reward_model": {"ground_truth": None}}, r"row 2, column reward_model\.ground_truth"),
        ([1], "row 2: expected an object, found a list"),
    ],
)
def test_a_bad_row_is_an_error_that_says_where(tmp_path: Path, row: Any, message: str):
    path = write(tmp_path / "d.jsonl", [{"question": "fine?", "answer": "yes"}, row])
    with pytest.raises(DataError, match=message) as error:
        read_prompts(path)
    assert str(path) in str(error.value)


def test_unusable_files(tmp_path: Path):
    with pytest.raises(DataError, match="no such data file"):
        read_prompts(tmp_path / "none.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "x", "answer": "y"}\n{"quest\n')
    with pytest.raises(DataError, match="row 2: not JSON"):
        read_prompts(broken)
    broken.write_bytes('{"question": "Où?", "answer": "x"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"broken\.jsonl, row 1: not JSON: 'utf-8' codec can't decode"):
        read_prompts(broken)
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="not readable as Parquet"):
        read_prompts(tmp_path / "bad.parquet")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        read_prompts(tmp_path / "empty.jsonl")
    (tmp_path / "d.csv").write_text("a,b")
    with pytest.raises(DataError, match="ends in"):
        read_prompts(tmp_path / "d.csv")
    rows = [{"id": "a", "question": "x", "answer": "y"}] * 2
    with pytest.raises(DataError, match=r"row 2, column id: 'a' is already the id of .*row 1"):
        read_prompts(write(tmp_path / "twice.jsonl", rows))


def test_task_from_configuration(tmp_path: Path):
    rows = [{"question": f"{i}+1?", "answer": i + 1} for i in range(8)]
    config = Config()
    config.task.name = "jsonl"
    config.task.path = str(write(tmp_path / "train.jsonl", rows[:6]))
    config.task.eval_path = str(write(tmp_path / "eval.jsonl", rows[6:]))
    config.task.train_size = 4
    task = JsonlTask(config)
    assert [p.answers for p in task.train()] == [("1",), ("2",), ("3",), ("4",)]
    assert [p.answers for p in task.eval()] == [("7",), ("8",)]
    config.task.eval_path = str(write(tmp_path / "eval.jsonl", rows[3:5]))
    with pytest.raises(DataError, match=r"is in .*train\.jsonl too"):
        JsonlTask(config)
    config.task.path = ""
    with pytest.raises(ConfigError, match=r"task\.path"):
        JsonlTask(config)
