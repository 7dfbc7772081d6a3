"""What a run says last."""

from __future__ import annotations

from observe_trees import evaluated, single

from system.config import Config
from system.observe.recorder import Recorder
from system.observe.rundir import RunDir
from system.observe.totals import report


def test_an_evaluation_that_asked_nothing_has_no_accuracy_to_tell(run_dir: RunDir, config: Config) -> None:
    recorder = Recorder(run_dir, config, [])
    recorder.evaluated(0, evaluated(), "before", 0.0, 0.0)
    assert "held-out" not in "".join(report(recorder.summary(), run_dir))
    recorder.evaluated(1, evaluated(single("a", 1)), "after", 1.0, 1.0)
    asked = [line for line in report(recorder.summary(), run_dir) if "held-out" in line]
    assert [line for line in asked if "after training: accuracy 1.000" in line] == asked != []
