"""A process that should be over, and is not."""

import subprocess
import sys

import pytest

WAITS = {
    "a thread": "threading.Thread(target=forever).start()",
    "an exit hook": "atexit.register(forever)",
}
PROGRAM = """
import atexit, threading
from actors.ending import exit_within

def forever():
    threading.Event().wait()

exit_within({deadline_s}, 3)
print("reported")
{waits}
"""


@pytest.mark.parametrize("what", WAITS)
def test_whatever_a_process_waits_for_at_its_end_is_named_and_left(what: str) -> None:
    program = PROGRAM.format(deadline_s=0.2, waits=WAITS[what])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "reported\n")
    assert "did not end within 0.2 s" in done.stderr
    assert "in forever" in done.stderr


def test_a_process_that_ends_by_itself_does_not_wait_for_the_deadline() -> None:
    program = PROGRAM.format(deadline_s=1000, waits="")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "reported\n", "")
