"""A fork server whose template takes no more requests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from actors import fork_server, forked
from actors.forked import SOCKET
from tests.actors.test_forking import LATE_S, asking

DRIVER = """
import os, signal
from actors.forking import fork_server
from system.config import Config

config = Config()
config.cluster.fork = "true"
with fork_server(config, []):
    print(os.environ[SOCKET], flush=True)
    signal.pause()
""".replace("SOCKET", repr(SOCKET))
PAD = 100_000  # bytes of the environment of each who asks


def large(request: bytes) -> bytes:
    told = json.loads(request)
    return json.dumps(told | {"environment": {**told["environment"], "PAD": "x" * PAD}}).encode()


def more_than_fit(stack: ExitStack, message: bytes) -> list[socket.socket]:
    """Those who have asked for more than twice what a socket holds."""
    askers = [stack.enter_context(asking())]
    held = askers[0].getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    askers += [stack.enter_context(asking()) for _ in range(2 * held // PAD + 2)]
    for asker in askers:
        socket.send_fds(asker, [message], [1, 2])
    return askers


@pytest.mark.slow
def test_a_template_that_hangs_does_not_hold_up_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_RAYLET_PID", str(os.getpid()))
    message = large(forked.request())
    with ExitStack() as stack:
        driver = psutil.Popen(
            [sys.executable, "-c", DRIVER],
            env=os.environ | {"TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.enter_context(driver)
        stack.callback(driver.kill)
        assert driver.stdout is not None
        monkeypatch.setenv(SOCKET, driver.stdout.readline().strip())
        (server,) = driver.children()
        with asking() as asker:
            socket.send_fds(asker, [message], [1, 2])
            assert asker.recv(1) == forked.FORKED
        (template,) = server.children()
        stack.callback(template.kill)  # before the driver, should this fail
        template.suspend()
        with ExitStack() as connections:
            askers = more_than_fit(connections, message)
            silent = connections.enter_context(asking())
            silent.settimeout(forked.DEADLINE_S / 2)
            assert silent.recv(1) == b""
            template.resume()  # in time: nobody is refused
            assert [asker.recv(1) for asker in askers] == [forked.FORKED] * len(askers)
        template.suspend()
        with ExitStack() as connections:
            more_than_fit(connections, message)
            bad = connections.enter_context(asking())
            bad.send(b"garbage")
            assert bad.recv(1) == b"", "all who came before have been heard"
            os.kill(driver.pid, signal.SIGKILL)
            psutil.wait_procs([server], LATE_S)
            assert not server.is_running()
        assert [*tmp_path.iterdir()] == []


def test_who_has_been_queued_for_too_long_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_RAYLET_PID", str(os.getpid()))
    monkeypatch.setenv(SOCKET, str(tmp_path))
    monkeypatch.setattr(fork_server, "DEADLINE_S", 0.2)
    message = large(forked.request())
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(fork_server, "_template", lambda *_: ours)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening, its, ExitStack() as connections:
        directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        connections.callback(os.close, directory)
        listening.bind(forked.address(directory))
        listening.listen()
        end, driver = os.pipe()
        stdin = connections.enter_context(os.fdopen(end))
        monkeypatch.setattr(sys, "stdin", stdin)
        serving = threading.Thread(target=fork_server.Server(listening, []).serve)
        serving.start()
        connections.callback(serving.join, LATE_S)
        connections.callback(os.close, driver)
        askers = more_than_fit(connections, message)
        assert askers[-1].recv(1) == b""
        taken, fds, _, _ = socket.recv_fds(its, len(message), 3)
        assert taken == message  # what had room before waits there
        with socket.socket(fileno=fds.pop()) as first:
            first.send(forked.FORKED)
        assert askers[0].recv(1) == forked.FORKED
        for fd in fds:
            os.close(fd)
    assert "takes no more" in capfd.readouterr().err
