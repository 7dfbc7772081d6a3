"""The file of answers: gone on with after a break, and of one evaluation only."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from system.errors import ConfigError
from system.evals.record import Answered, Asked, digest
from system.observe.answer_file import AnswerFile
from system.tree.prompt import Prompt

ABOUT = {"weights": {"model.safetensors": [1, 2]}, "eval": {"samples": 2}}
HOSTILE = "\u2028</script>\x1b[31m\ud800"


def answer(id: str, sample: int = 0, **more: object) -> Answered:
    given = {"correct": True, "outcome": "stopped", "text": HOSTILE, **more}
    return Answered("", id, "calc", sample, **given)  # type: ignore[arg-type]


def test_what_is_there_is_known(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "answers.jsonl"
    with closing(AnswerFile(path, ABOUT)) as file:
        assert not file.known
        for one in (answer("a"), answer("a", 1), answer("b", outcome="unanswered", correct=None)):
            file.add(one)
    with closing(AnswerFile(path, ABOUT)) as file:
        assert file.known == {("", "a", 0): answer("a"), ("", "a", 1): answer("a", 1)}


def test_a_torn_line_is_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with closing(AnswerFile(path, ABOUT)) as file:
        file.add(answer("a"))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"set": "", "id": "b", "ki')
    with closing(AnswerFile(path, ABOUT)) as file:
        assert [*file.known] == [("", "a", 0)]
        file.add(answer("c"))
    with closing(AnswerFile(path, ABOUT)) as file:
        assert [*file.known] == [("", "a", 0), ("", "c", 0)]
    assert path.read_bytes().startswith(whole)


def test_a_torn_first_line_is_none(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"abo')
    with pytest.raises(ConfigError, match="holds no answers of an evaluation"):
        AnswerFile(path, ABOUT)
    assert path.read_bytes() == b'{"abo', "it may be something else of the user's"


@pytest.mark.parametrize(
    "odd", ['{"set": [1], "id": "b", "kind": "k", "sample": 0, "outcome": "stopped"}', "[" * 100_000]
)
def test_an_answer_of_nonsense_is_refused(tmp_path: Path, odd: str) -> None:
    path = tmp_path / "answers.jsonl"
    with closing(AnswerFile(path, ABOUT)) as file:
        file.add(answer("a"))
    path.write_text(path.read_text() + odd + "\n")
    with pytest.raises(ConfigError, match="holds no answers of an evaluation"):
        AnswerFile(path, ABOUT)


def test_answers_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with closing(AnswerFile(path, ABOUT)) as file:
        file.add(answer("a"))
    told = (
        r"another evaluation: eval\.samples was 2, and is 4; name a new file, or set what it was made with$"
    )
    with pytest.raises(ConfigError, match=told):
        AnswerFile(path, {**ABOUT, "eval": {"samples": 4}})
    path.write_text("question,answer\n")
    with pytest.raises(ConfigError, match="holds no answers of an evaluation"):
        AnswerFile(path, ABOUT)
    assert path.read_text() == "question,answer\n"


def test_a_file_without_answers_is_begun_anew(tmp_path: Path) -> None:
    """An evaluation that could not start says nothing of the next one's settings."""
    path = tmp_path / "answers.jsonl"
    AnswerFile(path, ABOUT).close()
    other = {**ABOUT, "eval": {"samples": 4}}
    with closing(AnswerFile(path, other)) as file:
        file.add(answer("a"))
    with closing(AnswerFile(path, other)) as file:
        assert [*file.known] == [("", "a", 0)]


def test_questions_have_a_digest() -> None:
    def asked(gold: str) -> list[Asked]:
        return [Asked("", Prompt("a", ({"role": "user", "content": "2 + 2?"},), (gold,), kind="calc"), 0, 0)]

    assert digest(asked("4")) == digest(asked("4")) != digest(asked("5"))
