"""What is known of every tree that a run keeps, without its tokens: the rows of the list of trees."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from system.observe.terminal import visible
from system.text import described
from system.tree.record import Tree
from system.tree.store import StoreError, complete_files, from_table

_COLUMNS = (
    *("number", "prompt_id", "task", "reward", "correct", "parent", "leaf", "version", "episode"),
    *("calls.list.element.tool", "forks.list.element.delta_h", "forks.list.element.forks"),
    *("started_s", "closed_s"),
)
_MOST_BYTES = 24 << 20  # of all trees that are looked at together, about a million tokens


@dataclass(frozen=True, slots=True)
class TreeRow:
    """A tree in the list.  Text is safe to show (:func:`system.observe.terminal.visible`)."""

    number: int  # counts the trees of the run that were kept at first
    prompt: str
    task: str
    tools: tuple[str, ...]  # called at least once
    leaves: int
    forks: int
    depth: int  # nodes on the longest path
    calls: int
    tokens: int
    reward: float  # mean of the scored leaves; NaN without any
    spread: float  # their standard deviation; NaN without any
    correct: int
    judged: int
    delta_h: float  # the largest ΔH of a decision; NaN without any
    version_min: int  # of the sampled tokens; -1 without any
    version_max: int
    started_s: float  # unix time
    closed_s: float
    file: Path
    row: int  # in its file


class TreeIndex:
    """Looks at every file of the directories once: they appear whole, never change, and may go."""

    def __init__(self, directories: Iterable[Path], clock: Callable[[], float] = time.monotonic) -> None:
        self._directories, self._clock = tuple(directories), clock
        self._files: dict[Path, list[TreeRow]] = {}
        self._rows: dict[int, TreeRow] = {}
        self.waiting = 0  # files that were not looked at yet
        self.problems: dict[Path, str] = {}  # files that cannot be read

    @property
    def rows(self) -> dict[int, TreeRow]:
        """By number.  A new dictionary after a change, so a reader in another thread keeps what it has."""
        return self._rows

    def refresh(self, budget_s: float = float("inf")) -> None:
        """Look at new files, the newest first, for about ``budget_s`` seconds; forget those that are gone."""
        until = self._clock() + budget_s
        there = [path for directory in self._directories for path in complete_files(directory)]
        gone = self._files.keys() - there
        new = sorted((path for path in there if path not in self._files), reverse=True)
        for path in gone:
            del self._files[path]
            self.problems.pop(path, None)
        self.waiting, changed = len(new), bool(gone)
        for path in new:
            try:
                self._files[path] = list(look(path))
            except FileNotFoundError:  # pruned meanwhile
                pass
            except Exception as error:  # damaged bytes may fail anywhere: the other files are looked at
                self._files[path], self.problems[path] = [], visible(described(error))
            self.waiting, changed = self.waiting - 1, True
            if self._clock() >= until:
                break
        if changed:
            self._rows = {row.number: row for rows in self._files.values() for row in rows}


def look(path: Path) -> Iterator[TreeRow]:
    """The rows of one file."""
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        columns = [name for name in _COLUMNS if name.split(".")[0] in schema.names]
        at = 0
        for batch in file.iter_batches(_rows_together(file), columns=columns):
            yield from _rows(batch, path, at)
            at += batch.num_rows


def load(row: TreeRow) -> Tree:
    """The tree of a row, without its ``routes``, which may be larger than all the rest.

    Raises FileNotFoundError where its file was pruned, StoreError for a damaged one.
    """
    try:
        with pq.ParquetFile(row.file) as file:
            columns = [name for name in file.schema_arrow.names if not name.startswith("routes")]
            for at, batch in enumerate(file.iter_batches(1, columns=columns)):
                if at == row.row:
                    return next(from_table(pa.Table.from_batches([batch]), str(row.file)))
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise StoreError(f"{row.file} is not a readable Parquet file of trees: {error}") from error
    raise StoreError(f"{row.file} has no row {row.row}")


def _rows_together(file: pq.ParquetFile) -> int:
    """So many that their bytes find room.

    Columns are not asked: where what is said of one is damaged, pyarrow lets an exception of C++ through,
    which ends the process.
    """
    about = file.metadata
    size = sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups))
    return max(1, about.num_rows * _MOST_BYTES // size) if size > _MOST_BYTES else 1 << 16


def _rows(batch: pa.RecordBatch, path: Path, at: int) -> Iterator[TreeRow]:
    def arrays(name: str) -> list[Any]:
        if name not in batch.schema.names:
            return [np.zeros(0)] * batch.num_rows
        return [one.values.to_numpy(zero_copy_only=False) for one in batch.column(name)]

    def plain(name: str) -> list[Any]:
        return batch.column(name).to_pylist()

    texts, times = (
        zip(plain("prompt_id"), plain("task"), strict=True),
        (plain("started_s"), plain("closed_s")),
    )
    lists = [arrays(name) for name in ("reward", "correct", "parent", "leaf", "version", "episode")]
    rows = zip(plain("number"), texts, *lists, plain("calls"), plain("forks"), *times, strict=True)
    for i, row in enumerate(rows):
        number, (prompt, task), reward, correct, parent, leaf, version, episode, calls, forks, begin, end = (
            row
        )
        if episode.size:  # an episode's leaves share what they earned, and count once
            _, first = np.unique(episode, return_index=True)
            reward, correct = reward[first], correct[first]
        rewards, sampled = reward[np.isfinite(reward)], version[version >= 0]
        risen = [fork["delta_h"] for fork in forks if np.isfinite(fork["delta_h"])]
        yield TreeRow(
            number=number,
            prompt=visible(prompt),
            task=visible(task),
            tools=tuple(sorted({visible(call["tool"]) or "unknown" for call in calls})),
            leaves=int(reward.size),
            forks=sum(fork["forks"] for fork in forks),
            depth=_depth(parent.tolist(), leaf.tolist()),
            calls=len(calls),
            tokens=int(version.size),
            reward=float(rewards.mean(dtype=np.float64)) if rewards.size else float("nan"),
            spread=float(rewards.std(dtype=np.float64)) if rewards.size else float("nan"),
            correct=int((correct == 1).sum()),
            judged=int((correct >= 0).sum()),
            delta_h=max(risen, default=float("nan")),
            version_min=int(sampled.min()) if sampled.size else -1,
            version_max=int(sampled.max()) if sampled.size else -1,
            started_s=begin,
            closed_s=end,
            file=path,
            row=at + i,
        )


def _depth(parent: list[int], leaf: list[int]) -> int:
    depth: list[int] = []
    for above in parent:
        depth.append(1 if above < 0 else depth[above] + 1)
    return max((depth[node] for node in leaf), default=0)
