"""A program in a process group of its own, which ends as a whole, however it ends.

A process that leaves its group on purpose (``setsid``) is not seen; the sandbox is for programs that nobody
trusts.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from system.engine.sglang import supervisor
from system.redact import HIDDEN, redact

KEPT = 64 << 10  # bytes of each stream that are kept, the last
GRACE_S = 2.0  # between the request to end and the end
LOOK_S = 0.2  # between two looks whether it is gone
DRAIN_S = 1.0  # for the last output to be read after the end
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|COOKIE|AUTH(?!OR)", re.I)
_OURS = re.compile(r"RAY_|ESPALIER_|SLURM_")


@dataclass(frozen=True, slots=True)
class Program:
    """A directory for one program."""

    directory: Path
    secret: str  # no output of it is kept

    @classmethod
    def prepared(cls, parent: Path, secret: str) -> Program:
        return cls(Path(tempfile.mkdtemp(prefix="agent-", dir=parent)), secret)

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class ProcessEnd:
    """A program that is gone."""

    code: int  # 128 + n: signal n ended it
    stdout: str  # the last KEPT bytes, without the secret
    stderr: str
    cut: bool = False  # there was more of stdout before

    @property
    def shown(self) -> str:
        """What it put out, its errors last, with nothing in it that looks like a secret."""
        return redact("\n".join(text for text in (self.stdout.rstrip(), self.stderr.rstrip()) if text))


def inherited(keep: Sequence[str]) -> dict[str, str]:
    """This process's environment without what looks like a secret and what is of the run itself, ``keep``
    excepted.

    ``python`` there is the one that runs this, and what is asked for on this machine goes by no proxy.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in keep or not (_SECRET.search(name) or _OURS.match(name))
    }
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [kept.get("PYTHONPATH", ""), os.getcwd()]))
    for name in ("NO_PROXY", "no_proxy"):
        kept[name] = ",".join(filter(None, [kept.get(name, ""), "127.0.0.1", "localhost"]))
    return kept


async def run_program(
    program: Program, words: Sequence[str], environment: Mapping[str, str], keep: Sequence[str] = ()
) -> ProcessEnd:
    """Run ``words`` in the program's directory until it ends, and end with it whatever it has started.

    When this is cancelled, all of it is asked to end, and killed after ``GRACE_S``; when this process dies,
    at once.  Raises OSError where it cannot be started.
    """
    scratch = str(program.directory)
    env = {**inherited(keep), "TMPDIR": scratch, **environment}
    if shutil.which(words[0], path=env["PATH"]) is None:
        raise FileNotFoundError(f"there is no program {words[0]!r}")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", supervisor.__file__, *words),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        cwd=scratch,
        env=env,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    tails = [Tail(), Tail()]
    streams = zip(tails, (process.stdout, process.stderr), strict=True)
    reading = [asyncio.create_task(tail.read(stream)) for tail, stream in streams]
    try:
        await gone(process)
    finally:
        await _end(process, process.stdin)
        await asyncio.wait(reading, timeout=DRAIN_S)  # a stranger may hold the other end
        for task in reading:
            task.cancel()
    out, err = (tail.text.replace(program.secret, HIDDEN) for tail in tails)
    assert process.returncode is not None
    return ProcessEnd(process.returncode, out, err, tails[0].cut)


class Tail:
    """The last bytes of a stream."""

    def __init__(self) -> None:
        self._kept = b""
        self.cut = False  # there was more

    async def read(self, stream: asyncio.StreamReader) -> None:
        while chunk := await stream.read(KEPT):
            whole = self._kept + chunk
            self._kept, self.cut = whole[-KEPT:], self.cut or len(whole) > KEPT

    @property
    def text(self) -> str:
        return self._kept.decode("utf-8", "replace")


async def gone(process: Process) -> None:
    """Wait for the process alone: ``Process.wait`` of some versions waits for all who hold its pipes."""
    waiting = asyncio.create_task(process.wait())
    try:
        while process.returncode is None:
            await asyncio.wait([waiting], timeout=LOOK_S)
    finally:
        waiting.cancel()


async def _end(process: Process, owned: asyncio.StreamWriter) -> None:
    """End the supervisor, which ends the group: whoever is left of it."""
    try:
        if process.returncode is None:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(gone(process), GRACE_S)
    finally:
        owned.close()  # it then kills
        if process.returncode is None:
            process.send_signal(signal.SIGCONT)  # the program may have stopped it
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(gone(process), GRACE_S)
    if process.returncode is None:
        process.kill()  # and with it, by the kernel, what it has started
    await gone(process)
