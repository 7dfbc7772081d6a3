"""``espalier logs`` finds what each component of a run printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.cli.main import main
from system.cluster.status import log_files


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_of_a_local_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "logs" / "learner-0.log", "one\ntwo\nthree\n")
    write(tmp_path / "logs" / "engine-0.log", "ready\n")
    write(tmp_path / "logs" / "config-1.yaml", "no log\n")
    assert main(["logs", str(tmp_path)]) == 0
    listing = capsys.readouterr().out
    assert [line.split()[0] for line in listing.splitlines()] == ["engine-0", "learner-0"]
    assert main(["logs", str(tmp_path), "learner", "--lines", "2"]) == 0
    assert capsys.readouterr().out == "two\nthree\n"
    assert main(["logs", str(tmp_path), "tools"]) == 2
    assert "there are: engine-0, learner-0" in capsys.readouterr().err


def test_of_components_that_printed_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in {"engine-0": "ready\n", "learner-0": "", "learner-1": "", "rollout-0": ""}.items():
        write(tmp_path / "logs" / f"{name}.log", text)
    assert main(["logs", str(tmp_path)]) == 0
    listed, silent = capsys.readouterr().out.splitlines()
    assert listed.split()[0] == "engine-0"
    assert silent == "nothing printed by learner-0, learner-1, rollout-0"
    assert main(["logs", str(tmp_path), "learner"]) == 0
    assert capsys.readouterr().out == "nothing printed by learner-0, learner-1\nthere is text of engine-0\n"
    write(tmp_path / "logs" / "learner-1.log", "one\n")
    assert main(["logs", str(tmp_path), "learner"]) == 0
    assert capsys.readouterr().out == "one\nnothing printed by learner-0\n"


def test_of_a_submitted_run(tmp_path: Path) -> None:
    for attempt in ("000", "001"):
        write(tmp_path / "attempts" / attempt / "logs" / "driver.log", attempt)
    write(tmp_path / "slurm" / "job-7.log", "")
    write(tmp_path / "logs" / "sglang-0.log", "")
    assert [path.stem for path in log_files(tmp_path)] == ["job-7", "driver", "sglang-0"]
    assert log_files(tmp_path)[1].read_text() == "001"
    assert log_files(tmp_path, attempt=0)[1].read_text() == "000"


def test_of_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", str(tmp_path)]) == 2
    assert "has no logs yet" in capsys.readouterr().err
    assert main(["logs", str(tmp_path), "--attempt", "3"]) == 2
    assert "has no attempt 3" in capsys.readouterr().err
