from __future__ import annotations

import os
import subprocess
import sys

import pytest

from system.config import Config
from system.observe.rundir import RunDir
from system.observe.sinks import RESUMED
from system.observe.wandb_sink import WandbSink

_OFFLINE = """
import sys
from pathlib import Path
from system.config import Config
from system.observe.rundir import RunDir
from system.observe.wandb_sink import WandbSink

config = Config()
config.task.options = {"api_key": "hunter2"}
sink = WandbSink(RunDir(Path(sys.argv[1])), config)
assert sink._run is not None
for step in range(3):
    sink.write({"step": step, "time": 1.0, "train/loss": 1.0 / (step + 1), "eval/which": "before"})
sink.write({"resumed_from": 1})
sink.close()
assert sink._run is None
"""


def test_offline_run_is_written_silently_and_without_secrets(run_dir: RunDir):
    """In a process of its own, as W&B keeps a service and settings per process."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", _OFFLINE, str(run_dir.root)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
    (log,) = run_dir.wandb.glob("offline-run-*/run-*.wandb")
    written = log.read_bytes()
    assert b"train/loss" in written
    assert b"hunter2" not in written
    assert (run_dir.wandb / "id").read_text() in log.name


def test_disabled_does_nothing(run_dir: RunDir, config: Config):
    config.observe.wandb = "disabled"
    sink = WandbSink(run_dir, config)
    sink.write({"step": 1})
    sink.close()
    assert sink._run is None
    assert not run_dir.wandb.exists()


class _Failing:
    """A W&B run whose every call fails."""

    def log(self, record: dict[str, float]) -> None:
        raise RuntimeError("disk full while sending to https://u:hunter2@host")

    def finish(self) -> None:
        raise RuntimeError("never comes here")


def test_failing_to_start_is_said_and_the_run_goes_on(
    run_dir: RunDir, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import wandb

    def fail(**_: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(wandb, "init", fail)
    sink = WandbSink(run_dir, config)
    sink.write({"step": 1})
    sink.close()
    said = capsys.readouterr().err
    assert said.count("WARNING") == 1
    assert "no network" in said


def test_failing_later_is_said_once(run_dir: RunDir, config: Config, capsys: pytest.CaptureFixture[str]):
    config.observe.wandb = "disabled"
    sink = WandbSink(run_dir, config)
    sink._run = _Failing()  # type: ignore[assignment]
    for step in range(3):
        sink.write({"step": step})
    sink.write({RESUMED: 1})
    sink.close()
    said = capsys.readouterr().err
    assert said.count("WARNING") == 1
    assert "disk full" in said
    assert "hunter2" not in said
