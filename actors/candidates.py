"""The models that a run's is chosen of, each of a step: in ``candidates/``, by LoRA with its adapters."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from actors.learner import LearnerGroup
from system.config import Config
from system.observe.card import base_name
from system.observe.rundir import RunDir
from system.whole import appearing, take_name


class Candidates:
    """Writes them, and makes one the run's."""

    def __init__(self, config: Config, run_dir: RunDir) -> None:
        self._run_dir, self._lora, self._base = run_dir, config.learn.lora.on, base_name(config)

    def model(self, step: int) -> Path:
        """Where the model of a step lies; what is there is whole."""
        return self._run_dir.candidates / f"step-{step:06d}"

    def _adapter(self, step: int) -> Path:
        return self._run_dir.candidates / f"step-{step:06d}-adapter"

    @property
    def steps(self) -> list[int]:
        """Those whose models are there."""
        found = self._run_dir.candidates.glob("step-??????")
        return sorted(int(path.name.removeprefix("step-")) for path in found)

    async def save(self, step: int, learner: LearnerGroup) -> float | None:
        """Write the learner's weights, those of ``step``.  Returns ``Rounding.kept``."""
        self.drop(step)  # of a session that was lost
        if self._lora:  # before the model, whose presence says that all is there
            await learner.save_adapters(str(self._adapter(step)), self._base)
        return await learner.save_hf(str(self.model(step)))

    def drop(self, step: int) -> None:
        for path in (self.model(step), self._adapter(step)):
            shutil.rmtree(path, ignore_errors=True)

    def leave(self, step: int, *, stays: bool) -> None:
        """Make the model of ``step`` the run's.  ``stays``: a run that goes on may choose it again."""
        if self._adapter(step).is_dir():  # before the model, with which a run has come to its end
            _take(self._adapter(step), self._run_dir.adapter, stays)
        _take(self.model(step), self._run_dir.model, stays)


def _take(source: Path, target: Path, stays: bool) -> None:
    """Make ``target`` the directory ``source``, or a copy of it."""
    if not stays:
        take_name(source, target)
        return
    with appearing(target) as partial:
        shutil.copytree(source, partial, copy_function=_linked, dirs_exist_ok=True)


def _linked(source: str, target: str) -> None:
    """The same file under a second name where the file system can, which takes no room; else a copy."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)
