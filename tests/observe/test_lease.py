"""One driver per run directory, on one machine and over a file system without locks."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from system.observe.lease import NAME, held
from system.observe.rundir import RunDirError

HOLDER = """
import sys, time, pathlib
from system.observe.lease import held
with held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_driver_is_refused_by_name_until_the_first_is_gone(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(RunDirError, match=rf"process {first.pid} on .* stop that run first"),
            held(tmp_path),
        ):
            pass
        os.kill(first.pid, signal.SIGKILL)
    with held(tmp_path):
        assert str(os.getpid()) in (tmp_path / NAME).read_text()
    assert (tmp_path / NAME).read_text() == ""


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_touches_of_another_machine_tell(tmp_path: Path) -> None:
    taken, done = threading.Event(), threading.Event()

    def elsewhere() -> None:
        with held(tmp_path, beat_s=0.05, host="node-a"):
            taken.set()
            done.wait()

    other = threading.Thread(target=elsewhere)
    other.start()
    assert taken.wait(60)
    with pytest.raises(RunDirError, match="on node-a"), held(tmp_path, look_s=1.0, host="node-b"):
        pass
    done.set()
    other.join()
    with held(tmp_path, look_s=60.0, host="node-b"):  # given back: nobody waits
        pass


@pytest.mark.usefixtures("no_locks")
def test_a_holder_that_died_elsewhere_is_waited_out(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"host": "node-a", "pid": 7}')
    with held(tmp_path, look_s=0.2, host="node-b"):
        assert "node-b" in (tmp_path / NAME).read_text()
    (tmp_path / NAME).write_text("not JSON")
    with held(tmp_path, look_s=60.0):
        pass
