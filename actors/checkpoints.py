"""The checkpoints of a run directory, and which of them a resumed run goes on from."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from actors.learner import LearnerGroup
from system.errors import CheckpointError
from system.flow.ledger import Event, LedgerError, accounted, lineage, surviving_updates
from system.observe.jsonl import JsonlError, read_jsonl, split_off
from system.observe.rundir import RunDir

T = TypeVar("T")
LINEAGE = "lineage"  # in a checkpoint's extra: what its weights were trained on
_NAME = re.compile(r"v\d{6}")


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint whose weights the learner holds."""

    path: Path
    extra: dict[str, Any]

    @property
    def version(self) -> int:
        return version_of(self.path)


def checkpoints(run_dir: RunDir) -> list[Path]:
    """Complete checkpoints, oldest first (a checkpoint is renamed into place when it is whole)."""
    return sorted(path for path in run_dir.checkpoints.iterdir() if _NAME.fullmatch(path.name))


def version_of(checkpoint: Path) -> int:
    return int(checkpoint.name[1:])


def saved_trees_path(checkpoint: Path) -> Path:
    """The trees in flight at a checkpoint, beside it."""
    return checkpoint.with_suffix(".trees")


def aside(path: Path) -> Path:
    """A free name for what is of no more use: the same may have been damaged before."""
    names = (path.with_name(f"{path.name}.unused{n or ''}") for n in itertools.count())
    return next(name for name in names if not name.exists())


def _undamaged(ledger: Path) -> tuple[list[Event], str]:
    """The events before the first damaged line, and what is wrong with that ("": there is none)."""
    events: list[Event] = []
    try:
        for event in read_jsonl(ledger):
            surviving_updates([event])
            events.append(event)
    except (JsonlError, LedgerError) as error:
        return events, str(error)
    return events, ""


async def newest(
    run_dir: RunDir, take: Callable[[Path], Awaitable[T]], tell: Callable[[str], object], mend: str
) -> tuple[Path, T] | None:
    """The newest checkpoint that can be taken, and what ``take`` returned for it; None where there is none.

    ``take`` raises CheckpointError for one that is of no use: these are set aside, and ``tell`` is told.
    Raises CheckpointError if none is; ``mend`` is what may help then.
    """
    saved, unused = checkpoints(run_dir), list[tuple[Path, str]]()
    for path in reversed(saved):
        try:
            taken = await take(path)
        except CheckpointError as error:
            unused.append((path, str(error)))
            continue
        for old, why in unused:  # only now: where none is of use, the reason may be a setting
            old.rename(aside(old))
            tell(f"checkpoint not used: {why}; going back to step {version_of(path)}")
        return path, taken
    if saved:
        reasons = "\n".join(why for _, why in unused)
        raise CheckpointError(f"no checkpoint of {run_dir.root} can be used; {mend}\n{reasons}")
    return None


def prune(run_dir: RunDir, keep: int) -> None:
    """Remove all but the newest ``keep``, and trees in flight of a checkpoint that is not there."""
    for old in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    for old in run_dir.checkpoints.glob("*.trees"):
        if not old.with_suffix("").exists():
            old.unlink()


async def restore_newest(
    learner: LearnerGroup, run_dir: RunDir, tell: Callable[[str], None]
) -> Restored | None:
    """Load the newest checkpoint that is whole and that the ledger accounts for; None where there is none.

    A ledger that knows less than a checkpoint, or tells of other trees, would have prompts trained again, or
    never.  From a damaged line on it accounts for nothing: that part is set aside.  Raises CheckpointError if
    no checkpoint is of use.
    """
    ledger = run_dir.ledger_path
    events, damage = _undamaged(ledger)
    known, updates = accounted(events), surviving_updates(events)

    async def take(path: Path) -> dict[str, Any]:
        if version_of(path) > known:
            why = f"{path}: {ledger.name} accounts for steps up to {known} only"
            raise CheckpointError(f"{why}; {damage}" if damage else why)
        extra = await learner.load(str(path))
        if extra.get("version") != version_of(path) or "recorder" not in extra:
            raise CheckpointError(f"{path}: it holds version {extra.get('version')}, whatever its name says")
        told = lineage(updates, version_of(path))
        if extra.get(LINEAGE, told) != told:  # an older version of Espalier kept none
            raise CheckpointError(f"{path}: it was trained on other trees than {ledger.name} says")
        return extra

    mend = f"put {ledger} back as it was, or start a new run" if damage else "start a new run"
    found = await newest(run_dir, take, tell, mend)
    _split_off(ledger, len(events), damage, tell)
    return Restored(*found) if found else None


def _split_off(ledger: Path, events: int, damage: str, tell: Callable[[str], None]) -> None:
    """Go on after the first ``events`` events; the damaged rest is kept."""
    if damage:
        rest = aside(ledger)
        split_off(ledger, events, rest)
        tell(f"{damage}; the ledger from there on is kept as {rest}")
