"""Questions from data files, in the layouts that others use (:mod:`system.tasks.columns`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from system.config import Config, ConfigError
from system.tasks.columns import Columns, RowUnusable
from system.tasks.files import DataError, data_files, rows
from system.tree.prompt import Prompt

PATIENCE = 100  # rows of which one, at least, must be of use: else the layout is not understood


@dataclass
class DataSet:
    """The prompts of one ``task.path``, and what was left out."""

    path: str
    files: list[Path]
    prompts: list[Prompt] = field(default_factory=list)
    skipped: int = 0
    first: str = ""  # why the first row was skipped

    def told(self, what: str) -> str:
        """Which rows are used, in a line."""
        files = f" ({len(self.files)} files)" if len(self.files) > 1 else ""
        line = f"{what}: {len(self.prompts)} rows of {self.path}{files}"
        return f"{line}; {self.skipped} skipped, the first: {self.first}" if self.skipped else line


class JsonlTask:
    """Prompts of training and held-out files."""

    name = "jsonl"

    def __init__(self, config: Config) -> None:
        """``task.path`` (empty: no training questions), ``task.eval_path`` (empty: no held-out ones),
        ``task.columns`` and ``task.system_prompt``.

        At most ``task.train_size`` and ``task.eval_size`` rows are taken, the first ones; below 0: all.
        Raises DataError also for an id that one of them holds twice, or a question that both hold.
        """
        task = config.task
        system, columns = task.system_prompt, Columns(task.columns, config.guide.shows)
        faults: list[str] = []

        def taken(field: str, path: str, limit: int) -> DataSet:
            try:
                return read(path, system, limit, columns)
            except DataError as error:
                faults.append(f"{field}: {error}")
                return DataSet(path, [])

        self._train = taken("task.path", task.path, task.train_size) if task.path else None
        self._held_out = taken("task.eval_path", task.eval_path, task.eval_size) if task.eval_path else None
        if faults:
            raise DataError("\n".join(faults))
        if self._train and self._held_out:
            known = {_text(prompt) for prompt in self._train.prompts}
            for prompt in self._held_out.prompts:
                if _text(prompt) in known:
                    raise DataError(
                        f"{task.eval_path}: question {prompt.id!r} is in {task.path} too: take it out there"
                    )

    def train(self) -> list[Prompt]:
        """Raises ConfigError where no file is named."""
        if self._train is None:
            raise ConfigError("task.name=jsonl needs task.path=<a data file, a directory or a glob>")
        return self._train.prompts

    def eval(self) -> list[Prompt]:
        return self._held_out.prompts if self._held_out else []

    def notes(self) -> list[str]:
        """What was taken of the files, and what was not."""
        parts = (("training data", self._train), ("held-out data", self._held_out))
        return [part.told(what) for what, part in parts if part]


def read(path: str, system_prompt: str = "", limit: int = -1, columns: Columns | None = None) -> DataSet:
    """The prompts of the files that ``path`` stands for; ``limit`` below 0 reads all.

    ``system_prompt``, when set, replaces each row's own.  A row that is no question with an answer is skipped
    and counted.  Raises DataError for what cannot be read, for an id that comes twice, and when none of the
    first :data:`PATIENCE` rows, or of all of them, is of use.
    """
    columns = columns or Columns({})
    files = data_files(path)
    found = DataSet(path, [file for file, _ in files])
    where_of: dict[str, str] = {}
    for file, name in files:
        for number, where, row in rows(file):
            if limit == len(found.prompts):
                return found
            try:
                prompt = columns.prompt(row, where, f"{name}/{number}", system_prompt)
            except RowUnusable as error:
                found.skipped += 1
                found.first = found.first or str(error)
                if found.skipped == PATIENCE and not found.prompts:
                    break
                continue
            if prompt.id in where_of:
                raise DataError(
                    f"{where}, column id: {prompt.id!r} is already the id of {where_of[prompt.id]}; "
                    "task.columns.id='' numbers the rows instead"
                )
            where_of[prompt.id] = where
            found.prompts.append(prompt)
        if found.skipped >= PATIENCE and not found.prompts:
            break
    if not found.prompts:
        reason = f"none of {found.skipped} rows can be used; {found.first}" if found.first else "no rows"
        raise DataError(f"{path}: {reason}")
    return found


def _text(prompt: Prompt) -> str:
    """What is asked, the system prompt aside."""
    return "\n".join(message["content"] for message in prompt.messages if message["role"] != "system")
