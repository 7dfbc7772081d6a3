"""Weights & Biases: offline by default, online by ``observe.wandb=online``.

What goes there is the metrics, the alarms and the redacted configuration: no source code, no command line, no
console output.  With ``observe.wandb_trees`` also the newest trees, with what model and tools said in them.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from system.config import Config, to_dict
from system.observe.rundir import RunDir
from system.observe.sinks import Alarm, MetricsView, identity
from system.observe.tree_table import COLUMNS, newest_rows
from system.redact import redact

INIT_DEADLINE_S = 30.0
FINISH_DEADLINE_S = 60.0


class WandbView(MetricsView):
    """Sends records to one W&B run.  ``step`` is the x axis of every metric."""

    def __init__(self, run_dir: RunDir, config: Config) -> None:
        self._run_dir, self._config = run_dir, config
        os.environ.setdefault("WANDB_SILENT", "true")
        self._wandb = wandb = _imported(run_dir.wandb / "tmp")
        online = config.observe.wandb == "online"
        self._run = wandb.init(
            project=config.observe.project,
            name=run_dir.name,
            id=identity(run_dir.wandb),
            resume="allow" if online else None,  # offline sessions are joined by `wandb sync`
            dir=str(run_dir.root),
            mode="online" if online else "offline",
            config=redact(to_dict(config)),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                save_code=False,
                disable_job_creation=True,
                x_disable_meta=True,  # command line and host name
                init_timeout=INIT_DEADLINE_S,
                login_timeout=INIT_DEADLINE_S,
                finish_timeout=FINISH_DEADLINE_S,
                finish_timeout_raises=True,
            ),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Mapping[str, Any]) -> None:
        shown: dict[str, Any] = {key: value for key, value in record.items() if key != "time"}
        if "eval/which" in record and (most := self._config.observe.wandb_trees):
            rows = newest_rows(self._run_dir, self._config, most)
            shown |= {"trees": self._wandb.Table(columns=[*COLUMNS], data=rows)} if rows else {}
        self._run.log(shown)

    def alarm(self, alarm: Alarm) -> None:
        self._run.alert(
            title=f"{self._run_dir.name}: {alarm.name}"[:63],
            text=f"step {alarm.step}: {alarm.text}",
            level="WARN",
        )

    def close(self) -> None:
        self._run.finish()


def _imported(scratch: Path) -> Any:
    """W&B, which makes temporary directories when it is imported and leaves them when its process is killed:
    in ``scratch``, where the run's next session removes them.  Those of other threads stay where they are.
    """
    if (there := sys.modules.get("wandb")) is not None:  # it goes on with the directories that it has
        return there
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    mkdtemp, importing = tempfile.mkdtemp, threading.get_ident()

    def in_scratch(suffix: Any = None, prefix: Any = None, dir: Any = None) -> Any:
        ours = dir is None and threading.get_ident() == importing
        return mkdtemp(suffix, prefix, str(scratch) if ours else dir)

    tempfile.mkdtemp = in_scratch
    try:
        import wandb
    finally:
        tempfile.mkdtemp = mkdtemp
    return wandb
