from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from system.scratch import YOUNG_S, Scratch, sweep

OWNER = """
import time
from system.scratch import Scratch
print(Scratch.make("test").path, flush=True)
time.sleep(60)
"""


def test_what_a_killed_owner_left_is_removed_and_what_is_owned_or_young_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = Scratch.make("test")
    with subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    ) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        (theirs / "a" / "b").mkdir(parents=True)
        os.kill(other.pid, signal.SIGKILL)
    foreign = tmp_path / "somebody-elses"
    foreign.mkdir()
    assert sweep(tmp_path) == []  # too young to be sure
    old = time.time() - 2 * YOUNG_S
    for path in (mine.path, theirs, foreign):
        os.utime(path, (old, old))
    assert sweep(tmp_path) == [theirs]
    assert not theirs.exists()
    assert mine.path.is_dir()
    assert foreign.is_dir()
    assert (mine.path.stat().st_mode & 0o777) == 0o700
    mine.release()
    assert sweep(tmp_path) == [mine.path]
