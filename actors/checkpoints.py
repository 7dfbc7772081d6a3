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
from system.flow.ledger import accounted
from system.observe.jsonl import read_jsonl
from system.observe.rundir import RunDir

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


def _set_aside(checkpoint: Path) -> None:
    """Under a name that is free: the same step may have been damaged before."""
    names = (checkpoint.with_name(f"{checkpoint.name}.unused{n or ''}") for n in itertools.count())
    checkpoint.rename(next(name for name in names if not name.exists()))


async def restore_newest(
    learner: LearnerGroup, run_dir: RunDir, tell: Callable[[str], None]
) -> Restored | None:
    """Load the newest checkpoint that is whole and that the ledger accounts for; None where there is none.

    Newer ones that are not are set aside, and ``tell`` is told.  A ledger that knows less than a checkpoint
    would have prompts trained again.  Raises CheckpointError if none is of use.
    """
    saved, unused = checkpoints(run_dir), list[tuple[Path, str]]()
    known = accounted(read_jsonl(run_dir.ledger_path))
    for path in reversed(saved):
        if version_of(path) > known:
            unused.append((path, f"{path}: {run_dir.ledger_path.name} accounts for steps up to {known} only"))
            continue
        try:
            extra = await learner.load(str(path))
        except CheckpointError as error:
            unused.append((path, str(error)))
            continue
        if extra.get("version") != version_of(path) or "recorder" not in extra:
            unused.append((path, f"{path}: it holds version {extra.get('version')}, whatever its name says"))
            continue
        for old, why in unused:
            _set_aside(old)
            tell(f"checkpoint not used: {why}; going back to step {version_of(path)}")
        return Restored(path, extra)
    if saved:
        reasons = "\n".join(why for _, why in unused)
        raise CheckpointError(f"no checkpoint of {run_dir.root} can be used; start a new run\n{reasons}")
    return None
