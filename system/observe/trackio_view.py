"""trackio: Hugging Face's experiment tracker, which keeps everything in files of this machine."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping
from typing import Any

from system.config import Config, to_dict
from system.observe.rundir import RunDir
from system.observe.sinks import Alarm, MetricsView, identity, numbers
from system.redact import redact


class TrackioView(MetricsView):
    """One run of the project ``observe.project``; ``trackio show`` opens the page.

    What trackio prints is kept off the console.
    """

    def __init__(self, run_dir: RunDir, config: Config) -> None:
        import trackio

        self._trackio: Any = trackio
        name = (
            f"{run_dir.name}-{identity(run_dir.trackio)}"  # in another directory a run may be called the same
        )
        with contextlib.redirect_stdout(io.StringIO()):
            self._run: Any = trackio.init(
                project=config.observe.project,
                name=name,
                config=redact(to_dict(config)),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def write(self, record: Mapping[str, Any]) -> None:
        # It has no word for what is not known: such a number is left out.
        known = {key: value for key, value in numbers(record) if math.isfinite(value)}
        self._run.log(known, step=record["step"])

    def alarm(self, alarm: Alarm) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.alert(title=alarm.name, text=f"step {alarm.step}: {alarm.text}")

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()  # not the run's own, after which it is finished again at the exit
