"""Data files: the layouts of others, what is skipped and said, and errors that say where."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from system.config import Config, ConfigError
from system.tasks.base import first
from system.tasks.columns import Columns, RowUnusable, repair
from system.tasks.files import DataError, rows
from system.tasks.jsonl import JsonlTask, read
from system.tree.prompt import Prompt

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
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prompts(path: Path, **options: Any) -> list[Prompt]:
    return read(str(path), **options).prompts


def one(row: dict[str, Any], **named: str) -> Prompt:
    return Columns(named).prompt(row, "d.jsonl, line 1", "d/1")


def test_parquet_columns_that_python_cannot_hold_are_texts(tmp_path: Path) -> None:
    """Beside the question and the answer, which are read all the same."""
    table = pa.table(
        {
            "question": ["Who?"],
            "answer": ["me"],
            "at": pa.array([1_700_000_000_123_456_789], pa.timestamp("ns")),
            "far": pa.array([9_000_000], pa.date32()),
        }
    )
    pq.write_table(table, tmp_path / "data.parquet")
    ((_, _, row),) = rows(tmp_path / "data.parquet")
    assert (row["question"], row["answer"]) == ("Who?", "me")
    assert "123456789" in str(row["at"])
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["question", "question"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="two columns are called 'question': rename one"):
        list(rows(tmp_path / "twice.parquet"))


def test_released_columns_from_jsonl_and_parquet(tmp_path: Path):
    math_row = RELEASED | {
        "ability": "math",
        "reward_model": {"ground_truth": ["\x08oxed{5}"], "style": "rule"},
    }
    rows = [RELEASED, math_row]
    write(tmp_path / "data.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    for name in ("data.jsonl", "data.parquet"):
        first, second = prompts(tmp_path / name)
        assert first.messages == (
            {"role": "system", "content": "Answer with \\boxed{answer here}."},
            {"role": "user", "content": "Who wrote Dusk?"},
        )
        assert first.answers == ("Alda", "Alda M.")
        assert (first.kind, second.kind) == ("qa", "math")
        assert second.answers == ("5",)
        assert first.extra["data_source"] == "hotpotqa"
        assert first.extra["extra_info"]["question"] == "Who wrote Dusk?"
        assert (first.id, second.id) == ("data/1", "data/2")
        json.dumps(first.extra)


def test_ground_truth_as_one_text(tmp_path: Path):
    row = RELEASED | {"reward_model": {"ground_truth": "42", "style": "rule"}}
    assert prompts(write(tmp_path / "d.jsonl", [row]))[0].answers == ("42",)


def test_only_the_backspace_of_boxed_is_repaired():
    assert repair("a\x08oxed{1} b\x08 c") == "a\\boxed{1} b\x08 c"
    assert repair({"x": ["\x08oxed{}", 3]}) == {"x": ["\\boxed{}", 3]}


def test_plain_form_and_system_prompt(tmp_path: Path):
    rows = [
        {"question": "2+2?", "answer": 4},
        {"id": "q2", "question": "Capital?", "answer": ["Rome", "Roma"], "kind": "geo"},
    ]
    first, second = prompts(write(tmp_path / "d.jsonl", rows), system_prompt="Be brief.")
    assert first.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
    )
    assert (first.id, first.answers, first.kind) == ("d/1", ("4",), "default")
    assert (second.id, second.answers, second.kind) == ("q2", ("Rome", "Roma"), "geo")


def test_a_system_prompt_replaces_the_rows_own(tmp_path: Path):
    (prompt,) = prompts(write(tmp_path / "d.jsonl", [RELEASED]), system_prompt="Mine.")
    assert [m["content"] for m in prompt.messages] == ["Mine.", "Who wrote Dusk?"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"line 2: no question: expected the column one of prompt, .* found: text"),
        ({"question": " ", "answer": "x"}, "line 2, column question: expected a text that is not empty"),
        ({"question": "x"}, r"line 2: no answer .* task\.columns\.answer"),
        ({"question": "x", "answer": ""}, "line 2: no answer"),
        ({"question": "x", "answer": []}, "line 2: no answer"),
        ({"question": "x", "answer": [" "]}, "line 2, column answer: empty"),
        ({"question": "x", "answer": {"a": 1}}, "line 2, column answer: .* found an object of a"),
        ({"question": "x", "answer": True}, "line 2, column answer: .* found bool"),
        ({"question": "x", "answer": float("nan")}, "line 2: no answer"),
        ({"question": "x", "answer": float("inf")}, "line 2, column answer: inf is no answer"),
        (RELEASED | {"prompt": [{"content": "x"}]}, r"line 2, column prompt\[0\]"),
        (RELEASED | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, r"column prompt\[0\]"),
        (RELEASED | {"reward_model": None}, "line 2: no answer"),
        (RELEASED | {"reward_model": {"ground_truth": None}}, "line 2: no answer"),
    ],
)
def test_a_row_that_is_of_no_use_is_skipped_and_said(tmp_path: Path, row: Any, message: str):
    path = write(tmp_path / "d.jsonl", [{"question": "fine?", "answer": "yes"}, row, row])
    found = read(str(path))
    assert len(found.prompts) == 1
    assert found.skipped == 2
    told = found.told("training data")
    assert told.startswith(f"training data: 1 rows of {path}; 2 skipped, the first: {path}, line 2")
    with pytest.raises(RowUnusable, match=message):
        Columns({}).prompt(row, f"{path}, line 2", "d/2")


def test_a_layout_that_is_not_understood_is_an_error_at_once(tmp_path: Path):
    path = write(tmp_path / "d.jsonl", [{"text": str(i)} for i in range(10_000)])
    with pytest.raises(DataError, match=r"none of 100 rows can be used; .*line 1: no question"):
        read(str(path))


def test_unusable_files(tmp_path: Path):
    def fails(name: str, content: bytes | None, message: str) -> None:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=message) as error:
            read(str(path))
        assert str(path) in str(error.value)

    fails("none.jsonl", None, "no such data file")
    fails("*.parquet", None, "no such data file")
    good = b'{"question": "x", "answer": "y"}\n'
    fails("torn.jsonl", good + b'{"quest\n', "line 2: not JSON")
    fails("list.jsonl", good + b"[1]\n", "line 2: expected an object, found a list")
    fails("deep.jsonl", good + b"[" * 100_000, "line 2: not JSON")
    latin = '{"question": "Où?", "answer": "x"}'.encode("latin-1")
    fails("latin.jsonl", good + latin, r"line 2: not UTF-8 \(byte 0xf9 at 16\): convert .*iconv")
    fails("latin.csv", "question,answer\nOù?,x\n".encode("latin-1"), "line 2: not UTF-8")
    fails("latin.json", b"[" + latin + b"]", "line 1: not UTF-8")
    fails("wide.csv", b"question,answer\na,b\na,b,c\n", "line 3: 3 fields, but 2 columns")
    fails("half.jsonl", b"\xff\xfe{\x00\x00\xd8", "not UTF-16")
    fails("number.json", b"12", "expected a list of objects, found a int")
    fails("torn.json", b'[{"question": ', "not JSON")
    fails("bad.parquet", b"not parquet", "not readable as Parquet")
    fails("empty.jsonl", b"\n", "no rows")
    fails("cut.jsonl.gz", gzip.compress(good * 99)[:-9], "not readable as gzip")
    fails("plain.jsonl.gz", good, "not readable as gzip")
    fails("d.txt", b"a,b", "ends in")
    (tmp_path / "bare").mkdir()
    fails("bare", None, "none that ends in")
    rows = [{"id": "a", "question": "x", "answer": "y"}] * 2
    path = write(tmp_path / "twice.jsonl", rows)
    with pytest.raises(DataError, match=r"line 2, column id: 'a' is already the id of .*line 1; .*columns"):
        read(str(path))
    assert [p.id for p in prompts(path, columns=Columns({"id": ""}))] == ["twice/1", "twice/2"]


ROWS = [{"question": "Wo ist Köln?", "answer": "am Rhein"}, {"question": "2\n+2?", "answer": "4"}]


def test_every_kind_of_file_reads_alike(tmp_path: Path):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "wide.jsonl").write_bytes(lines.decode().encode("utf-16"))
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "list.json").write_text(json.dumps(ROWS))
    (tmp_path / "held.json").write_text(json.dumps({"version": "1", "data": ROWS}))
    (tmp_path / "lines.json").write_bytes(lines)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    for name, delimiter in (("c.csv", ","), ("t.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["question", "answer"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    for path in sorted(tmp_path.iterdir()):
        read_so = [(p.messages[0]["content"], p.answers) for p in prompts(path)]
        assert read_so == [("Wo ist Köln?", ("am Rhein",)), ("2\n+2?", ("4",))], path.name
    assert prompts(tmp_path / "z.jsonl.gz")[0].id == "z/1"


def test_directories_and_globs(tmp_path: Path):
    for name in ("b/train.jsonl", "a/train.jsonl", "a/more.jsonl"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "data" / name, ROWS[:1])
    (tmp_path / "data" / "a" / "dataset_info.json").write_text("{}")
    (tmp_path / "data" / "README.md").write_text("no data")
    assert [p.id for p in prompts(tmp_path / "data")] == ["a/more/1", "a/train/1", "b/train/1"]
    assert [p.id for p in prompts(tmp_path / "data" / "*" / "train.jsonl")] == ["a/train/1", "b/train/1"]
    assert read(str(tmp_path / "data" / "**" / "*.jsonl")).told("data").endswith("(3 files)")
    write(tmp_path / "data" / "a" / "test.jsonl", ROWS[1:])
    with pytest.raises(DataError, match=r"several splits \(test, train\): name the files of one, .*train"):
        read(str(tmp_path / "data"))


ASKED = [{"role": "user", "content": "Who?"}]


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"prompt": ASKED, "reward_model": {"ground_truth": "me", "style": "rule"}}, ("me",)),  # verl
        (
            {"prompt": ASKED, "reward_model": {"ground_truth": {"target": ["me", "I"]}}},
            ("me", "I"),
        ),  # Search-R1
        ({"prompt": ASKED, "reward_spec": {"ground_truth": "me"}, "env_class": "qa"}, ("me",)),  # SkyRL
        ({"prompt": json.dumps(ASKED), "label": "me", "metadata": {}}, ("me",)),  # slime
        ({"prompt": "Who?", "label": 12}, ("12",)),
        ({"input": "Who?", "label": "me", "datasource": "q"}, ("me",)),  # OpenRLHF
        ({"prompt": "Who?", "completion": " me."}, ("me.",)),  # TRL
        ({"prompt": ASKED, "completion": [{"role": "assistant", "content": "me"}]}, ("me",)),
        ({"messages": [*ASKED, {"role": "assistant", "content": "so \\boxed{me}"}]}, ("me",)),
        ({"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "me"}]}, ("me",)),
        ({"question": "Who?", "ground_truth": "me", "data_source": "q"}, ("me",)),  # rLLM
        (
            {
                "prompt": [{"role": "user", "content": "placeholder"}],
                "reward_model": {"style": "rule", "ground_truth": None},
                "extra_info": {"problem": "Who?", "answer": "me"},
            },
            ("me",),
        ),
        ({"id": "test_0", "question": "Who?", "golden_answers": ["me"], "metadata": {}}, ("me",)),  # FlashRAG
        ({"problem": "Who?", "solution": "It is \\boxed{me}.", "answer": "me", "level": 3}, ("me",)),
        ({"problem": "Who?", "solution": "It is $\\boxed{\\frac{1}{2}}$."}, ("\\frac{1}{2}",)),  # MATH
        ({"question": "Who?", "answer": "3 + 9 = <<3+9=12>>12\n#### 12"}, ("12",)),  # GSM8K
        ({"instruction": "Who?", "input": "", "output": "me"}, ("me",)),  # Alpaca
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}], "answer": "me"},
            ("me",),
        ),
    ],
)
def test_the_layouts_of_others(row: dict[str, Any], answers: tuple[str, ...]):
    prompt = one(row)
    assert prompt.messages == ({"role": "user", "content": "Who?"},)
    assert prompt.answers == answers
    json.dumps(prompt.extra, allow_nan=False)


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        ('["Rome","Roma"]', ("Rome", "Roma")),
        ("['Rome', 'L\\'Aquila']", ("Rome", "L'Aquila")),  # a list as pandas writes it into a CSV
        ("['Rome'\n 'Roma']", ("Rome", "Roma")),  # an array, in the same way
        ("[1, 2]", ("[1, 2]",)),  # an answer
        ("\\boxed{12}", ("12",)),
        ("Thus $x=\\boxed{12}$.", ("12",)),
        (12.0, ("12",)),
        (0.5, ("0.5",)),
        (7, ("7",)),
        ({"target": ["a", "b", "a"]}, ("a", "b")),
        ('{"target": ["a"]}', ("a",)),
        ({"value": "Rome", "aliases": ["Roma"]}, ("Rome", "Roma")),
        ({"text": ["Rome"], "answer_start": [3]}, ("Rome",)),
        ("#### Heading\nand more", ("#### Heading\nand more",)),
        ("C# and F#", ("C# and F#",)),
    ],
)
def test_gold_answers_in_their_disguises(value: Any, answers: tuple[str, ...]):
    assert one({"question": "x", "answer": value}).answers == answers


def test_gold_answers_as_numpy_has_them():
    np = pytest.importorskip("numpy")
    assert one({"question": "x", "answer": np.array(["a", "b"])}).answers == ("a", "b")
    assert one({"question": "x", "answer": np.float64(12.0)}).answers == ("12",)


def test_columns_are_named_and_all_others_are_kept():
    row = {"q": "Who?", "meta": {"gold": "me"}, "answer": "no", "n": 3, "score": float("nan"), "none": None}
    prompt = one(row, question="q", answer="meta.gold", id="n", kind="answer")
    assert (prompt.id, prompt.kind, prompt.answers) == ("3", "no", ("me",))
    assert prompt.extra == {"meta": {"gold": "me"}, "answer": "no", "n": 3, "score": None}
    assert one({"q": "Who?"}, question="q", answer="").answers == ()
    assert one({"": 7, "question": "Who?", "answer": "me"}).id == "d/1"  # the index of a data frame
    system = one({"system": "Be brief.", "question": "Who?", "answer": "me"}).messages[0]
    assert system == {"role": "system", "content": "Be brief."}
    with pytest.raises(DataError, match=r"task\.columns\.anwser: it may name .*did you mean answer"):
        Columns({"anwser": "x"})
    with pytest.raises(RowUnusable, match=r"expected the column frage; found: q"):
        one({"q": "x"}, question="frage")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
names = (
    st.sampled_from([*RELEASED, "question", "answer", "messages", "label", "id", "kind", "input"]) | st.text()
)


@settings(max_examples=100, deadline=None)
@given(
    row=st.dictionaries(names, values, max_size=5)
    | st.fixed_dictionaries({"question": values, "answer": values})
)
def test_any_row_is_a_prompt_or_a_clear_reason(row: dict[str, Any]):
    try:
        prompt = one(row)
    except RowUnusable as error:
        reason = str(error)
    else:
        reason = ""
    assert not reason or reason.startswith("d.jsonl, line 1")
    if reason:
        return
    assert prompt.answers
    assert all(prompt.answers)
    assert any(m["content"].strip() for m in prompt.messages)
    json.dumps([prompt.messages, prompt.answers, prompt.extra, prompt.kind], allow_nan=False).encode()
    (prompt.id + prompt.kind + "".join(prompt.answers)).encode()


@settings(max_examples=60, deadline=None)
@given(
    content=st.binary(max_size=60),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".jsonl.gz", ".parquet"]),
)
def test_any_bytes_are_read_or_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
):
    path = tmp_path_factory.mktemp("fuzz") / f"d{suffix}"
    path.write_bytes(content)
    reason = str(path)
    try:
        read(str(path))
    except DataError as error:
        reason = str(error)
    assert str(path) in reason


def test_all_rows_are_used_unless_told_otherwise(tmp_path: Path):
    config = Config()
    rows = [{"question": f"{i}+1?", "answer": i + 1} for i in range(10_300)]
    config.task.path = str(write(tmp_path / "train.jsonl", rows[:10_000]))
    config.task.eval_path = str(write(tmp_path / "eval.jsonl", rows[10_000:]))
    task = JsonlTask(config)
    assert len(task.train()) == 10_000
    assert len(first(task.eval(), config.eval.questions)) == 300
    assert len(first(task.eval(), 7)) == 7
    assert not first(task.eval(), 0)


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
    config.task.train_size = -1
    told = [
        f"training data: 6 rows of {tmp_path}/train.jsonl",
        f"held-out data: 2 rows of {tmp_path}/eval.jsonl",
    ]
    assert JsonlTask(config).notes() == told
    config.task.eval_path = str(write(tmp_path / "eval.jsonl", rows[3:5]))
    with pytest.raises(DataError, match=r"is in .*train\.jsonl too"):
        JsonlTask(config)
    config.task.path = ""
    of_an_evaluation = JsonlTask(config)
    assert of_an_evaluation.notes() == told[1:]
    with pytest.raises(ConfigError, match=r"task\.path"):
        of_an_evaluation.train()


MESSAGES = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "<search> a </search>"},
    {"role": "tool", "content": "found"},
    {"role": "assistant", "content": "<search> b </search>"},
    {"role": "user", "content": "<result> found too </result>"},
    {"role": "assistant", "content": "Alda"},
]


@pytest.mark.parametrize(
    ("value", "actions", "segments"),
    [
        (["open the page", "click"], ("open the page", "click"), 4),
        (json.dumps(["open the page", "click"]), ("open the page", "click"), 4),
        (MESSAGES, ("<search> a </search>", "<search> b </search>"), 5),
        (
            MESSAGES[:4],
            ("<search> a </search>",),
            3,
        ),  # what it last wrote has no result: it may be the answer
        (MESSAGES[:1], (), 0),
        ("they searched", (), 0),
        ([], (), 0),
    ],
)
def test_demonstrations_that_guides_are_made_of(value: Any, actions: tuple[str, ...], segments: int):
    row = {"question": "Who?", "answer": "Alda", "demonstration": value, "way": value}
    for columns in (Columns({}, guided=True), Columns({"demonstration": "way"}, guided=True)):
        prompt = columns.prompt(row, "d.jsonl, line 1", "d/1")
        assert (prompt.actions, len(prompt.demonstration)) == (actions, segments)
    assert one(row).demonstration == (), "nobody asked for it"
    assert Columns({}, guided=True).prompt({"question": "Who?", "answer": "A"}, "d", "1").actions == ()


def test_a_demonstration_that_is_none_is_said():
    row = {"question": "Who?", "answer": "Alda", "demonstration": [{"role": "assistant"}]}
    with pytest.raises(RowUnusable, match=r"column demonstration\[0\]: expected \{role, content\}"):
        Columns({}, guided=True).prompt(row, "d.jsonl, line 1", "d/1")


def test_guides_are_read_from_files(tmp_path: Path):
    config = Config()
    config.task.path = str(
        write(tmp_path / "d.jsonl", [{"question": "Who?", "answer": "A", "actions": ["x"]}])
    )
    assert JsonlTask(config).train()[0].actions == ()
    config.guide.others = 0.5
    assert JsonlTask(config).train()[0].actions == ("x",)


def test_a_conversation_with_calls_is_asked_without_them() -> None:
    """The rows that `espalier sft` learns from, as questions: nothing of what the model did is told."""
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
    }
    openai = [{"role": "system", "content": "S"}, {"role": "user", "content": "Who?"}, call,
              {"role": "tool", "content": "Ada"}, {"role": "assistant", "content": "Ada."}]  # fmt: skip
    sharegpt = [{"from": "human", "value": "Who?"}, {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "Ada"}, {"from": "gpt", "value": "Ada."}]  # fmt: skip
    one = Columns({}).prompt({"messages": openai}, "x", "1")
    other = Columns({}).prompt({"conversations": sharegpt, "system": "S", "answer": "Ada"}, "x", "2")
    assert one.messages == other.messages
    assert [message["content"] for message in one.messages] == ["S", "Who?"]
    assert (one.answers, other.answers) == (("Ada.",), ("Ada",))
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"},
             {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada"}]  # fmt: skip
    assert len(Columns({}).prompt({"messages": plain}, "x", "3").messages) == 3
