"""An interpreter that has imported what a run's actors need, and from which they are forked.

Run by :mod:`.forking` as ``python -m actors.fork_server SOCKET_FD MODULE...``.  It never starts a thread, a
computation or Ray, so what is forked from it is as good as new; its memory is shared until somebody writes to
it, and its imports are done once.

There are two floors.  Ray reads on import what a raylet has put into its workers' environment, so the
modules that know nothing of Ray (``system``) are imported at once, Ray and the actors in a fork of that, as
soon as the first worker of a raylet is asked for.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import numpy as np

_ACTORS = (
    *("ray._private.workers.default_worker", "actors.engine", "actors.learner", "actors.rollout"),
    "actors.tools",
)
_REQUEST = 1 << 20  # bytes; a worker whose environment is larger starts by itself
_RAYLET = "RAY_RAYLET_PID"


def main(socket_fd: int, modules: Sequence[str]) -> None:
    """Import, then fork a worker for everyone who asks, until standard input ends."""
    server = socket.socket(fileno=socket_fd)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers: Ray knows when they end
    _imported(modules)
    raylet, floor = "", socket.socket()
    while True:
        ready, _, _ = select.select([server, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = server.accept()
        with connection:
            message, fds, _, _ = socket.recv_fds(connection, _REQUEST, 3)
            if len(fds) == 3:
                environment = json.loads(message)[1]
                if environment[_RAYLET] != raylet:
                    raylet = environment[_RAYLET]
                    floor.close()  # of an earlier raylet, which has ended
                    floor = _second_floor(environment, [0, socket_fd, connection.fileno(), *fds])
                socket.send_fds(floor, [message], [*fds, connection.fileno()])
            for fd in fds:
                os.close(fd)


def _imported(modules: Sequence[str]) -> None:
    """Import ``modules``, of which nothing is garbage: a collection in a forked process would write to every
    object, and copy its page.
    """
    from system.learn import cpu

    gc.disable()
    with cpu.quick_import():
        for module in modules:
            importlib.import_module(module)
    gc.freeze()
    gc.enable()


def _second_floor(environment: dict[str, str], not_its: Sequence[int]) -> socket.socket:
    """Start it for the raylet of ``environment``; returns the socket that takes requests, at whose end it
    ends.  ``not_its``: descriptors that would stay open with it.
    """
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        its.close()
        return ours

    def serve() -> None:
        ours.close()
        for fd in not_its:
            os.close(fd)
        os.environ.update(environment)
        _imported(_ACTORS)
        while True:
            message, fds, _, _ = socket.recv_fds(its, _REQUEST, 4)
            if not message:
                return
            if not os.fork():
                its.close()
                _become(partial(_work, message, fds))
            for fd in fds:
                os.close(fd)

    _become(serve)


def _become(what: Callable[[], None]) -> NoReturn:
    """Do ``what`` to the end of this process, in which its parent's work must not go on."""
    code = 1
    try:
        what()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _work(message: bytes, fds: Sequence[int]) -> None:
    """Be the Ray worker that was asked for; ``fds``: its standard streams, and the socket it was asked at."""
    from ray._raylet import Config  # pyright: ignore[reportAttributeAccessIssue]

    arguments, environment, directory = json.loads(message)
    os.setpgid(0, 0)  # the raylet kills the group of a worker that ends
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, fd in enumerate(fds[:3]):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    np.random.seed()  # drawn on import; Python's own generator sees to itself
    Config.initialize("")  # reads the environment again, but for what is one raylet's
    with socket.socket(fileno=fds[3]) as asked:
        asked.send(b"F")
    # What setup_worker.py would replace this process by: the script that the arguments name.
    parser = argparse.ArgumentParser()
    parser.add_argument("--serialized-runtime-env-context")
    parser.add_argument("--language")
    _, sys.argv = parser.parse_known_args(arguments)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
