"""A process that should be over, and is not."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from actors import session
from system.config import Config
from system.errors import INTERRUPTED
from system.observe.rundir import RunDir

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


WAITING = """
import asyncio, os, signal, threading
from actors import ending

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so

ending.CLEAN_S, ending.AT_ONCE_S = {clean_s}, {at_once_s}

async def main():
    loop = asyncio.get_running_loop()
    with ending.signals():
        for number in {numbers}:
            loop.call_soon(os.kill, os.getpid(), number)
        await asyncio.to_thread(threading.Event().wait)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("numbers", "clean_s", "at_once_s"),
    [([signal.SIGHUP], 0.2, 1000), ([signal.SIGTERM, signal.SIGINT], 1000, 0.2)],
)
def test_a_start_that_waits_for_a_thread_ends_on_signals(
    numbers: list[int], clean_s: float, at_once_s: float
) -> None:
    program = WAITING.format(numbers=[int(one) for one in numbers], clean_s=clean_s, at_once_s=at_once_s)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "")


def test_a_run_that_cannot_be_drawn_ends_as_it_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config()
    config.run.dir = str(tmp_path)
    run = RunDir.create(config)
    run.metrics_path.write_text('{"step": 1}\n\x00\x00\n{"step": 2}\n')
    session.draw_curves(run)
    assert "the curves are not drawn: JsonlError" in capsys.readouterr().err
