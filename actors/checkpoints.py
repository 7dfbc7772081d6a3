"""The checkpoints of a run directory, and which of them a resumed run goes on from."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.learner import LearnerGroup
from system.errors import CheckpointError
from system.flow.ledger import Event, LedgerError, accounted, lineage, surviving_updates
from system.observe.jsonl import JsonlError, read_jsonl, split_off
from system.observe.rundir import RunDir

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


async def restore_newest(
    learner: LearnerGroup, run_dir: RunDir, tell: Callable[[str], None]
) -> Restored | None:
    """Load the newest checkpoint that is whole and that the ledger accounts for; None where there is none.

    Newer ones that are not are set aside, and ``tell`` is told.  A ledger that knows less than a checkpoint,
    or tells of other trees, would have prompts trained again, or never.  From a damaged line on it accounts
    for nothing: that part is set aside, too.  Raises CheckpointError if no checkpoint is of use.
    """
    ledger, saved, unused = run_dir.ledger_path, checkpoints(run_dir), list[tuple[Path, str]]()
    events, damage = _undamaged(ledger)
    known, updates = accounted(events), surviving_updates(events)
    for path in reversed(saved):
        if version_of(path) > known:
            why = f"{path}: {ledger.name} accounts for steps up to {known} only"
            unused.append((path, f"{why}; {damage}" if damage else why))
            continue
        try:
            extra = await learner.load(str(path))
        except CheckpointError as error:
            unused.append((path, str(error)))
            continue
        if extra.get("version") != version_of(path) or "recorder" not in extra:
            unused.append((path, f"{path}: it holds version {extra.get('version')}, whatever its name says"))
            continue
        told = lineage(updates, version_of(path))
        if extra.get(LINEAGE, told) != told:  # an older version of Espalier kept none
            unused.append((path, f"{path}: it was trained on other trees than {ledger.name} says"))
            continue
        for old, why in unused:
            old.rename(aside(old))
            tell(f"checkpoint not used: {why}; going back to step {version_of(path)}")
        _split_off(ledger, len(events), damage, tell)
        return Restored(path, extra)
    if saved:
        reasons = "\n".join(why for _, why in unused)
        mend = f"put {ledger} back as it was, or " if damage else ""
        raise CheckpointError(
            f"no checkpoint of {run_dir.root} can be used; {mend}start a new run\n{reasons}"
        )
    _split_off(ledger, len(events), damage, tell)
    return None


def _split_off(ledger: Path, events: int, damage: str, tell: Callable[[str], None]) -> None:
    """Go on after the first ``events`` events; the damaged rest is kept."""
    if damage:
        rest = aside(ledger)
        split_off(ledger, events, rest)
        tell(f"{damage}; the ledger from there on is kept as {rest}")
