"""The model that a run leaves: the last one, or that of the best evaluation (``eval.choose``)."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.learner import LearnerGroup
from system.config import Config
from system.observe.card import base_name
from system.observe.recorder import Recorder
from system.observe.rundir import RunDir

LORA_KEPT = "eval/lora_kept"  # of an evaluation's record: ``Rounding.kept`` of the model that it is of


class ModelChoice:
    """Keeps the weights of the best evaluation so far in ``candidates/``, and leaves them as ``model/``.

    A metric is ``<metric>`` of the task's own questions, or ``<set>/<metric>``; the highest is the best, of
    equals the latest.  The evaluation before training is of no trained model and is not chosen.
    """

    def __init__(self, config: Config, run_dir: RunDir, learner: LearnerGroup) -> None:
        self._run_dir, self._learner, self._base = run_dir, learner, base_name(config)
        self._lora, self._by = config.learn.lora.on, config.eval.choose
        of_set, _, metric = self._by.rpartition("/")
        self._key = f"eval/set/{of_set}/{metric}" if of_set else f"eval/{metric}"

    @property
    def on(self) -> bool:
        """Whether there is something to choose."""
        return self._by != "last"

    async def save(self, step: int) -> float | None:
        """Write the learner's weights, those of ``step``, before they are evaluated; nobody trains meanwhile.
        Returns ``Rounding.kept``.
        """
        self.drop(step)  # of a session that was lost
        if self._lora:
            await self._learner.save_adapters(str(self._adapter(step)), self._base)
        return await self._learner.save_hf(str(self._model(step)))

    def drop(self, step: int) -> None:
        for path in (self._model(step), self._adapter(step)):
            shutil.rmtree(path, ignore_errors=True)

    def keep_best(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Remove the weights of all evaluations but the best of ``records``."""
        best = self._best(records)
        for path in list(self._run_dir.candidates.glob("step-??????")):
            step = int(path.name.removeprefix("step-"))
            if best is None or step != best["step"]:
                self.drop(step)

    def leave(self, records: Sequence[Mapping[str, Any]], recorder: Recorder) -> str:
        """Make the best model the run's; returns which, for people."""
        best = self._best(records)
        assert best is not None, "the evaluation after training has just been recorded"
        step, value = best["step"], best[self._key]
        _take(self._model(step), self._run_dir.model)
        if self._lora:
            _take(self._adapter(step), self._run_dir.adapter)
        if (kept := best.get(LORA_KEPT)) is not None:
            recorder.model_merged(kept)
        recorder.chosen(step, self._by, value)
        return f"model of step {step}: the highest {self._by}, {value:.3f}"

    def _best(self, records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """Of the evaluations whose weights are there."""
        there = [
            one for one in records if one["eval/which"] != "before" and self._model(one["step"]).is_dir()
        ]
        return max(there, key=lambda one: (_known(one.get(self._key)), one["step"]), default=None)

    def _model(self, step: int) -> Path:
        return self._run_dir.candidates / f"step-{step:06d}"

    def _adapter(self, step: int) -> Path:
        return self._run_dir.candidates / f"step-{step:06d}-adapter"


def _known(value: float | None) -> float:
    """What is not known is worse than any other."""
    return -math.inf if value is None or math.isnan(value) else value


def _take(source: Path, target: Path) -> None:
    """Make ``target`` the files of ``source``, which stay: a run that goes on may choose them again."""
    partial = target.with_name(f"{target.name}.partial")
    for old in (partial, target):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=_linked)
    partial.rename(target)


def _linked(source: str, target: str) -> None:
    """The same file under a second name where the file system can, which takes no room; else a copy."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)
