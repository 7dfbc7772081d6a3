"""What a model's tokenizer does not know of the questions."""

from __future__ import annotations

from pathlib import Path

import pytest
from byte_tokenizer import byte_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import Unigram, WordLevel
from tokenizers.pre_tokenizers import Whitespace

from system.config import load
from system.tasks.base import make_task, notes
from system.tasks.vocabulary import unknown_tokens
from system.tree.prompt import Prompt

QUESTIONS = [
    Prompt("a", ({"role": "system", "content": "sum"}, {"role": "user", "content": "one two"}), ("three",)),
    Prompt("b", ({"role": "user", "content": "one \u9905"},), ("two", "2")),
]


def words() -> Tokenizer:
    made = Tokenizer(WordLevel({"<unk>": 0, "one": 1, "two": 2, "sum": 3}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    return made


def pieces() -> Tokenizer:
    made = Tokenizer(Unigram([("one", -1.0), ("<unk>", 0.0), ("two", -1.0), ("sum", -1.0)], unk_id=1))
    made.pre_tokenizer = Whitespace()
    return made


@pytest.mark.parametrize("tokenizer", [words(), pieces()], ids=["words", "pieces"])
def test_unknown_tokens_of_questions_and_answers_are_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = unknown_tokens(str(tmp_path), QUESTIONS)
    assert found is not None
    assert (found.count, found.of, found.example) == (3, 8, "three")
    assert found.too_many
    assert unknown_tokens(str(tmp_path), [Prompt("c", ({"role": "user", "content": "one two"},), ())]) is None


def test_a_few_are_no_reason_to_refuse(tmp_path: Path) -> None:
    words().save(str(tmp_path / "tokenizer.json"))
    text = "one two " * 20 + "\u9905"
    found = unknown_tokens(str(tmp_path), [Prompt("c", ({"role": "user", "content": text},), ())])
    assert found is not None
    assert not found.too_many


def test_a_tokenizer_of_bytes_knows_everything(tmp_path: Path) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert unknown_tokens(str(tmp_path), QUESTIONS) is None


@pytest.mark.parametrize("content", [None, "{}"])
def test_without_a_whole_tokenizer_nothing_is_said(content: str | None, tmp_path: Path) -> None:
    if content:
        (tmp_path / "tokenizer.json").write_text(content)
    assert unknown_tokens(str(tmp_path), QUESTIONS) is None


def test_a_run_says_what_its_model_cannot_read_and_that_questions_are_missing(tmp_path: Path) -> None:
    words().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "data.jsonl").write_text('{"question": "one two six", "answer": "two"}\n')
    (tmp_path / "held.jsonl").write_text('{"question": "two", "answer": "one"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"task: {{name: jsonl, path: {tmp_path}/data.jsonl, eval_path: {tmp_path}/held.jsonl}}")
    config = load(recipe, [f"model.path={tmp_path}", "eval.questions=5"])
    *_, few, unknown = notes(config, make_task(config))
    assert few == "eval.questions=5: there are only 1 held-out questions, and all are asked"
    assert unknown.startswith("1 of the first 4 tokens of questions and answers are unknown to the model")
