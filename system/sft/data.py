"""Conversations from data files: read, the unusable counted and told, some of them held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from system.config import SftConfig
from system.sft.forms import Conversation, Forms
from system.tasks.columns import RowUnusable
from system.tasks.files import DataError, data_files, rows

TOLD = 20  # unusable rows that are told, of more the number


@dataclass
class DataFiles:
    """The conversations of one path, and the rows that are none."""

    path: str
    conversations: list[Conversation] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # file, line and reason

    @property
    def rows(self) -> int:
        return len(self.conversations) + len(self.faults)


@dataclass(frozen=True, slots=True)
class SplitData:
    """What is trained on, and what is held out."""

    train: Sequence[Conversation]
    held_out: Sequence[Conversation]
    faults: Sequence[str]  # rows that were left out, with the reasons


def read(sft: SftConfig, seed: int, limit: int = -1) -> SplitData:
    """The conversations that are configured.  ``limit``: rows of each path that are looked at; below 0 all.

    Raises :class:`DataError` for what cannot be read, and with the rows that are unusable where they are more
    than ``sft.skip`` lets be.
    """
    if not sft.path:
        raise DataError("sft.path is empty: name the conversations, for example sft.path=conversations.jsonl")
    forms = Forms(sft.form, sft.columns)
    found = read_files(sft.path, forms, sft.skip, limit)
    if not sft.eval_path:
        train, held_out = held_apart(found.conversations, sft.eval_share, seed)
        return SplitData(train, held_out, found.faults)
    held = read_files(sft.eval_path, forms, sft.skip, limit)
    known = {one.key(): one.where for one in found.conversations}
    for one in held.conversations:
        if other := known.get(one.key()):
            raise DataError(f"sft.eval_path: {one.where} is the same as {other}: take it out there")
    return SplitData(found.conversations, held.conversations, [*found.faults, *held.faults])


def read_files(path: str, forms: Forms, skip: float, limit: int = -1) -> DataFiles:
    """The conversations of one path; raises as :func:`read` does."""
    found = DataFiles(path)
    for file, _ in data_files(path):
        for _, where, row in rows(file, damaged=lambda error: found.faults.append(str(error))):
            if 0 <= limit <= found.rows:
                break
            try:
                found.conversations.append(forms.conversation(row, where))
            except RowUnusable as error:
                found.faults.append(str(error))
    if not found.rows:
        raise DataError(f"{path}: no rows")
    if len(found.faults) > skip * found.rows or not found.conversations:
        raise DataError("\n".join(unusable_lines(path, found.faults, found.rows, skip)))
    return found


def unusable_lines(path: str, faults: Sequence[str], rows: int, skip: float) -> list[str]:
    """Which rows cannot be used, and the remedy."""
    lines = [*faults[:TOLD]]
    if len(faults) > TOLD:
        lines.append(f"{path}: … and {len(faults) - TOLD} more")
    lines.append(
        f"{path}: {len(faults)} of {rows} rows ({len(faults) / rows:.2%}) are unusable, sft.skip={skip:g} "
        f"lets {int(skip * rows)} be left out: correct them, or raise sft.skip"
    )
    return lines


def held_apart(
    conversations: Sequence[Conversation], share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(What is trained on, what is held out): a ``share`` of the questions, whatever the order of the rows.

    Conversations about one question are on one side.
    """
    if not share:
        return list(conversations), []

    def place(question: str) -> str:
        return hashlib.sha256(f"{seed} {question}".encode()).hexdigest()

    asked = [json.dumps(one.question, ensure_ascii=True, sort_keys=True) for one in conversations]
    questions = sorted(set(asked), key=place)
    count = round(share * len(questions))
    if not 0 < count < len(questions):
        raise DataError(
            f"sft.eval_share={share:g} of {len(questions)} different questions holds out {count}: there must "
            "be some on both sides; change it, or name sft.eval_path"
        )
    out = {*questions[:count]}
    train = [one for one, question in zip(conversations, asked, strict=True) if question not in out]
    held = [one for one, question in zip(conversations, asked, strict=True) if question in out]
    return train, held
