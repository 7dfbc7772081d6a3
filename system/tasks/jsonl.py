"""Questions from a file: JSON lines or Parquet, in ARPO's released columns or as plain question and answer.

ARPO's columns (RUC-NLPIR/ARPO, as released): ``data_source``, ``prompt`` [{content, role}], ``ability``,
``reward_model`` {ground_truth, style}, ``extra_info`` {index, question, split, ...}, ``metadata``.
The plain form is ``question`` and ``answer`` (a text, a number, or a list of accepted ones), and optionally
``id`` and ``kind``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from system.config import Config, ConfigError
from system.tree.prompt import Prompt

Row = Mapping[str, Any]


class DataError(ConfigError):
    """A data file that cannot be used; the message names the file, the row and the column."""


class JsonlTask:
    """Prompts of a training and a held-out file."""

    name = "jsonl"

    def __init__(self, config: Config) -> None:
        """``task.path``, ``task.eval_path`` (empty: no held-out questions) and ``task.system_prompt``.

        At most ``task.train_size`` and ``task.eval_size`` rows are taken, the first ones.  Raises DataError
        also for an id, or a question, that both files hold.
        """
        if not config.task.path:
            raise ConfigError("task.name=jsonl needs task.path=<a .jsonl or .parquet file>")
        system = config.task.system_prompt
        self._train = read_prompts(Path(config.task.path), system, config.task.train_size)
        self._held_out: list[Prompt] = []
        if config.task.eval_path:
            self._held_out = read_prompts(Path(config.task.eval_path), system, config.task.eval_size)
            known = {_text(prompt) for prompt in self._train}
            for prompt in self._held_out:
                if _text(prompt) in known:
                    raise DataError(
                        f"{config.task.eval_path}: question {prompt.id!r} is in {config.task.path} too"
                    )

    def train(self) -> list[Prompt]:
        return self._train

    def eval(self) -> list[Prompt]:
        return self._held_out


def read_prompts(path: Path, system_prompt: str = "", limit: int = -1) -> list[Prompt]:
    """The prompts of a ``.jsonl`` or ``.parquet`` file; ``limit`` < 0 reads all.

    ``system_prompt``, when set, replaces each row's own.  Raises DataError for the first bad row.
    """
    if not path.is_file():
        raise DataError(f"no such data file: {path}")
    prompts: list[Prompt] = []
    where_of: dict[str, str] = {}
    for number, row in _rows(path):
        if len(prompts) == limit:
            break
        where = f"{path}, row {number}"
        prompt = to_prompt(row, where, f"{path.stem}/{number}", system_prompt)
        if prompt.id in where_of:
            raise DataError(f"{where}, column id: {prompt.id!r} is already the id of {where_of[prompt.id]}")
        where_of[prompt.id] = where
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path}: no rows")
    return prompts


def to_prompt(row: Row, where: str, default_id: str, system_prompt: str = "") -> Prompt:
    """One row of either form.  ``where`` names it in errors."""
    row = repair(row)
    if "prompt" in row:
        return _released(row, where, default_id, system_prompt)
    if "question" in row:
        return _plain(row, where, default_id, system_prompt)
    columns = ", ".join(sorted(row)) or "none"
    raise DataError(f"{where}: expected a column `prompt` (ARPO's form) or `question`; found: {columns}")


def repair(value: Any) -> Any:
    r"""Mend ``\boxed`` where a writer took ``\b`` for a backspace (0x08), as in all of ARPO's released
    files."""
    if isinstance(value, str):
        return value.replace("\x08oxed", "\\boxed")
    if isinstance(value, Mapping):
        return {key: repair(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [repair(item) for item in value]
    return value


def _released(row: Row, where: str, default_id: str, system_prompt: str) -> Prompt:
    messages = _messages(row["prompt"], f"{where}, column prompt")
    reward_model = row.get("reward_model")
    if not isinstance(reward_model, Mapping) or "ground_truth" not in reward_model:
        raise DataError(f"{where}, column reward_model: expected {{ground_truth, style}}")
    extra = row.get("extra_info") or {}
    if not isinstance(extra, Mapping):
        raise DataError(f"{where}, column extra_info: expected an object")
    kept = {key: row[key] for key in ("data_source", "ability", "extra_info", "metadata") if row.get(key)}
    return Prompt(
        id=default_id,  # extra_info.index repeats across the sources that were merged into one file
        messages=_with_system(messages, system_prompt),
        answers=_answers(reward_model["ground_truth"], f"{where}, column reward_model.ground_truth"),
        kind=str(row.get("ability") or row.get("data_source") or "default"),
        extra=json.loads(json.dumps(kept, default=str)),
    )


def _plain(row: Row, where: str, default_id: str, system_prompt: str) -> Prompt:
    question = row["question"]
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}, column question: expected a text that is not empty")
    if "answer" not in row:
        raise DataError(f"{where}: column answer is missing")
    return Prompt(
        id=str(row.get("id") or default_id),
        messages=_with_system(({"role": "user", "content": question},), system_prompt),
        answers=_answers(row["answer"], f"{where}, column answer"),
        kind=str(row.get("kind") or "default"),
    )


def _messages(value: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{where}: expected a list of {{role, content}}")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise DataError(f"{where}[{i}]: expected {{role, content}}, both texts")
        messages.append({"role": message["role"], "content": message["content"]})
    return tuple(messages)


def _with_system(messages: tuple[dict[str, str], ...], text: str) -> tuple[dict[str, str], ...]:
    if not text:
        return messages
    return ({"role": "system", "content": text}, *(m for m in messages if m["role"] != "system"))


def _answers(value: Any, where: str) -> tuple[str, ...]:
    """One accepted answer or a list of them, as texts."""
    found = list(value) if isinstance(value, list | tuple) else [value]
    texts = []
    for item in found:
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise DataError(f"{where}: expected a text or a number, found {type(item).__name__}")
        if isinstance(item, float) and not math.isfinite(item):
            raise DataError(f"{where}: {item} is no answer")
        texts.append(str(item).strip())
    if not texts or not all(texts):
        raise DataError(f"{where}: empty")
    return tuple(texts)


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(row number from 1, row); of JSON lines the line number."""
    if path.suffix == ".parquet":
        try:
            with pq.ParquetFile(path) as file:
                batches = file.iter_batches(batch_size=1024)
                yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
        except pa.ArrowException as error:
            raise DataError(f"{path}: not readable as Parquet: {error}") from error
    elif path.suffix in (".jsonl", ".json"):
        yield from _json_lines(path)
    else:
        raise DataError(f"{path}: expected a name that ends in .jsonl or .parquet")


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, row {number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, row {number}: expected an object, found a {type(row).__name__}")
            yield number, row


def _text(prompt: Prompt) -> str:
    """What is asked, the system prompt aside."""
    return "\n".join(message["content"] for message in prompt.messages if message["role"] != "system")
