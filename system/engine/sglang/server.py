"""One SGLang server process: started, watched until it answers, stopped, and never left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from system.engine.protocol import EngineError
from system.engine.sglang.command import Command

LOOK_S = 0.2
WATCH_S = 5.0
HUNG_S = 120.0  # SGLang's own watchdog looks after its scheduler; this is about the whole server
STOP_S = 15.0  # the supervisor's own grace, and some
TAIL_LINES = 25
_SUPERVISOR = Path(__file__).with_name("supervisor.py")


class ServerFailed(EngineError):
    """The server ended, or did not answer in time; the message carries the end of its log."""


class SglangServer:
    """A server in a process group of its own, which ends with the process that started it, however that ends.

    ``log``: what the server says, appended over restarts.
    """

    def __init__(self, command: Command, url: str, log: Path) -> None:
        self.url, self.log = url, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = log.stat().st_size if log.exists() else 0
        environment = {**os.environ, **command.env}
        if "PYTHONPATH" in os.environ and "PYTHONPATH" in command.env:
            environment["PYTHONPATH"] = f"{command.env['PYTHONPATH']}:{os.environ['PYTHONPATH']}"
        with log.open("ab") as out:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SUPERVISOR), *command.argv],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait_ready(self, deadline_s: float) -> str:
        """Return the URL once the server is healthy.

        Raises :class:`ServerFailed` when it ends before that or has not answered by the deadline.
        """
        until = time.monotonic() + deadline_s
        while not self._healthy():
            if (status := self.exited()) is not None:
                raise ServerFailed(f"SGLang at {self.url} ended with status {status}; {self._tail()}")
            if time.monotonic() > until:
                raise ServerFailed(f"SGLang at {self.url}: not ready within {deadline_s:g} s; {self._tail()}")
            time.sleep(LOOK_S)
        return self.url

    def exited(self) -> int | None:
        """The exit status of a server that has ended, None while it runs."""
        return self._supervisor.poll()

    def wait(self, hung_s: float = HUNG_S) -> ServerFailed:
        """Block until the server ends, or is killed because it has not answered for ``hung_s``; says why."""
        answered = time.monotonic()
        while self.exited() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._supervisor.wait(WATCH_S)
                break
            if self._healthy():
                answered = time.monotonic()
            elif time.monotonic() - answered > hung_s:
                self.kill()
                return ServerFailed(
                    f"SGLang at {self.url}: no answer for {hung_s:g} s, killed; {self._tail()}"
                )
        return ServerFailed(f"SGLang at {self.url} ended with status {self.exited()}; {self._tail()}")

    def stop(self) -> None:
        """End the whole process group: asked first, killed after a grace period."""
        self._supervisor.terminate()
        try:
            self._supervisor.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the whole process group at once."""
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.close()  # what the supervisor takes for the owner's end
        self._supervisor.wait(STOP_S)

    def _healthy(self) -> bool:
        # Neither through a proxy nor after a redirect: another server's health is not this one's.
        connection = HTTPConnection(urlsplit(self.url).netloc, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (HTTPException, OSError):
            return False
        finally:
            connection.close()

    def _tail(self) -> str:
        """The last lines that this start of the server wrote."""
        with self.log.open("rb") as file:
            file.seek(max(self._log_start, self.log.stat().st_size - 20_000))
            lines = file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join([f"the end of {self.log}:", *lines])
