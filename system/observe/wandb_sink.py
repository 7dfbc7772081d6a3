"""Weights & Biases: offline by default, online by ``observe.wandb=online``.

It is a view of ``metrics.jsonl``, so its failures are said loudly, once, and never stop the run.  What goes
there is the metrics and the redacted configuration: no source code, no command line, no console output.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from system.config import Config, to_dict
from system.observe.rundir import RunDir
from system.observe.sinks import RESUMED
from system.observe.terminal import shown
from system.redact import redact

INIT_DEADLINE_S = 30.0
FINISH_DEADLINE_S = 60.0


class WandbSink:
    """Sends records to one W&B run.  ``step`` is the x axis of every metric."""

    def __init__(self, run_dir: RunDir, config: Config) -> None:
        self._run = None
        mode = config.observe.wandb
        if mode == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            wandb = _imported(run_dir.wandb / "tmp")
            self._run = wandb.init(
                project=config.observe.project,
                name=run_dir.name,
                id=_run_id(run_dir),
                resume="allow" if mode == "online" else None,  # offline sessions are joined by `wandb sync`
                dir=str(run_dir.root),
                mode="online" if mode == "online" else "offline",
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
        except (Exception, SystemExit) as error:  # a missing login ends in SystemExit in some versions
            self._give_up("did not start", error)

    def write(self, record: Mapping[str, Any]) -> None:
        if self._run is None or RESUMED in record:
            return
        try:
            self._run.log({key: value for key, value in record.items() if key != "time"})
        except Exception as error:
            self._give_up("stopped taking metrics", error)

    def close(self) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up("did not finish", error)
        self._run = None

    def _give_up(self, what: str, error: BaseException) -> None:
        self._run = None
        reason = shown(str(error)).strip() or type(error).__name__
        print(
            f"WARNING: Weights & Biases {what}: {reason}\n"
            "         The run goes on; its metrics are in metrics.jsonl. "
            "Set observe.wandb=disabled to do without W&B.",
            file=sys.stderr,
            flush=True,
        )


def _imported(scratch: Path) -> Any:
    """W&B, which makes temporary directories when it is imported and leaves them when its process is killed:
    in ``scratch``, where the run's next session removes them.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    before, tempfile.tempdir = tempfile.tempdir, str(scratch)
    try:
        import wandb
    finally:
        tempfile.tempdir = before
    return wandb


def _run_id(run_dir: RunDir) -> str:
    """W&B's identity of this run, kept so that a resumed session goes on in the same W&B run."""
    path = run_dir.wandb / "id"
    if not path.is_file():
        run_dir.wandb.mkdir(exist_ok=True)
        path.write_text(secrets.token_hex(6), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
