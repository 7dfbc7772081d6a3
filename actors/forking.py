"""The fork server of a run on one machine without GPUs, which imports beside the driver's own start.

Ray runs every actor in a process of its own here as it does on a cluster; only how that process begins is
another: instead of a new interpreter that imports for seconds, a fork of one that has (:mod:`.fork_server`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from pathlib import Path

from actors.forked import FAILED, SOCKET, address
from system.config import Config
from system.scratch import Scratch

TRAINING = ("system.learn.trainer",)  # what a learner imports
GROWING = ("system.engine.embedded", "system.rollout.context", "system.tools.servers")
_OF_RAY = (
    "jsonschema",
    "requests",
    "yaml",
    "msgpack",
    "psutil",
    "google.protobuf.message",
)  # what Ray imports
_BACKLOG = 128  # workers that may ask before it is ready
_LOOK_S = 0.5
# How long Ray waits for a worker that it has started (60 s by itself): one that waits in vain for the fork
# server has to start by itself after that.
_REGISTER = "RAY_worker_register_timeout_seconds"
_REGISTER_S = 150
# Workers that Ray starts at a time (by itself as many as there are cores): a fork takes little of them.
_AT_ONCE, _AT_ONCE_COUNT = "RAY_worker_maximum_startup_concurrency", 16
_GPUS = ("dev/nvidia[0-9]*", "dev/kfd")  # devices of NVIDIA and AMD


def wanted(config: Config, root: Path = Path("/")) -> bool:
    """Whether the actors are to be forked (``cluster.fork``); ``root``: where devices are looked for.

    They are not where they go to a cluster, or may compute on a GPU: CUDA does not survive a fork.
    """
    cluster = config.cluster
    if cluster.fork == "false" or sys.platform != "linux":
        return False
    if cluster.address or os.environ.get("RAY_ADDRESS") or cluster.gpus_per_node:
        return False
    has_gpus = any(found for kind in _GPUS for found in root.glob(kind))
    return cluster.fork == "true" or not (has_gpus or config.engine.device == "cuda")


@contextlib.contextmanager
def fork_server(config: Config, parts: Sequence[str]) -> Generator[None]:
    """One for the length of the block, which has imported the modules ``parts``, where it is wanted.

    Should it end, or hang, the workers of the block start as Ray would start them, of which people are told
    once.
    """
    if not wanted(config):
        yield
        return
    with contextlib.ExitStack() as stack:
        # Of mode 0700: who may connect may have anything done.
        scratch = Scratch.make("fork")
        stack.callback(scratch.release)
        directory = str(scratch.path)
        stack.callback(shutil.rmtree, directory, ignore_errors=True)  # the server may have
        server = _started(directory, parts)
        stack.callback(server.communicate)
        stack.callback(_kill, server)
        settings = {_REGISTER: str(_REGISTER_S), _AT_ONCE: str(_AT_ONCE_COUNT)}
        stack.enter_context(_environment({SOCKET: directory, **settings}))
        stack.enter_context(_told_of_failure(Path(directory) / FAILED))
        yield


def _started(directory: str, parts: Sequence[str]) -> subprocess.Popen[bytes]:
    """The server, which listens in ``directory`` from now on; it ends with its standard input."""
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
            listening.bind(address(opened))
            listening.listen(_BACKLOG)
            # OpenMP reads its variable as it is loaded; Ray would set it for an actor.  Of GPUs torch asks
            # NVML, if anybody asks torch: CUDA itself would be no good in the forked processes.
            given = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
            return subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "actors.fork_server",
                    str(listening.fileno()),
                    directory,
                    *_OF_RAY,
                    *parts,
                ],
                env=given,
                stdin=subprocess.PIPE,
                pass_fds=[listening.fileno()],
                start_new_session=True,
            )
    finally:
        os.close(opened)


def _kill(server: subprocess.Popen[bytes]) -> None:
    """End the server and its template, which may be importing still; workers have groups of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Generator[None]:
    """Add ``values`` for the length of the block, where they are not set."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ |= new
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _told_of_failure(failed: Path) -> Generator[None]:
    """Tell people when a worker has had to start by itself, by the file that it leaves."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK_S) and not _text(failed):
            pass
        if why := _text(failed):
            print(
                f"espalier: {why}: actors start by themselves from now on, which takes longer and more "
                "memory (cluster.fork)",
                file=sys.stderr,
                flush=True,
            )

    looking = threading.Thread(target=look, name="fork server", daemon=True)
    looking.start()
    try:
        yield
    finally:
        ended.set()
        looking.join()


def _text(path: Path) -> str:
    """What stands there; nothing where there is no such file."""
    return path.read_text() if path.exists() else ""
