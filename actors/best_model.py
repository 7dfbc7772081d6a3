"""The model that a run leaves: the last one, or that of the best evaluation (``eval.choose``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from actors.candidates import Candidates
from actors.learner import LearnerGroup
from system.config import Config
from system.observe.recorder import Recorder
from system.observe.rundir import RunDir

LORA_KEPT = "eval/lora_kept"  # of an evaluation's record: ``Rounding.kept`` of the model that it is of


class ModelChoice:
    """Keeps the weights of the best evaluation so far in ``candidates/``, and leaves them as ``model/``.

    A metric is ``<metric>`` of the task's own questions, or ``<set>/<metric>``; the highest is the best, of
    equals the latest.  The evaluation before training is of no trained model and is not chosen.
    """

    def __init__(self, config: Config, run_dir: RunDir, learner: LearnerGroup) -> None:
        self._candidates, self._learner, self._by = Candidates(config, run_dir), learner, config.eval.choose
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
        return await self._candidates.save(step, self._learner)

    def drop(self, step: int) -> None:
        """Remove the weights of ``step``, whose evaluation was cut off."""
        self._candidates.drop(step)

    def keep_best(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Remove the weights of all evaluations but the best of ``records``."""
        best = self._best(records)
        for step in self._candidates.steps:
            if best is None or step != best["step"]:
                self.drop(step)

    def leave(self, records: Sequence[Mapping[str, Any]], recorder: Recorder) -> str:
        """Make the best model the run's; returns which, for people."""
        best = self._best(records)
        assert best is not None, "the evaluation after training has just been recorded"
        step, value = best["step"], best[self._key]
        self._candidates.leave(step, stays=True)
        if (kept := best.get(LORA_KEPT)) is not None:
            recorder.model_merged(kept)
        recorder.chosen(step, self._by, value)
        return f"model of step {step}: the highest {self._by}, {value:.3f}"

    def _best(self, records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """Of the evaluations whose weights are there."""
        saved = self._candidates.steps
        there = [one for one in records if one["eval/which"] != "before" and one["step"] in saved]
        return max(there, key=lambda one: (_known(one.get(self._key)), one["step"]), default=None)


def _known(value: float | None) -> float:
    """What is not known is worse than any other."""
    return -math.inf if value is None or math.isnan(value) else value
