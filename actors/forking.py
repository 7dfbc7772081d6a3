"""The fork server of a run on one machine without GPUs, which imports beside the driver's own start.

Ray runs every actor in a process of its own here as it does on a cluster; only how that process begins is
another: instead of a new interpreter that imports for seconds, a fork of one that has (:mod:`.fork_server`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence

from actors.forked import SOCKET
from system.config import Config

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


@contextlib.contextmanager
def fork_server(config: Config, parts: Sequence[str]) -> Generator[None]:
    """One for the length of the block, which has imported the modules ``parts``.

    None where the actors go to a cluster, or hold GPUs: CUDA does not survive a fork.
    """
    given = config.cluster.address or os.environ.get("RAY_ADDRESS", "")
    if not config.cluster.fork or given or config.cluster.gpus_per_node:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="espalier-") as directory:  # of mode 0700
        path = os.path.join(directory, "fork")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
            listening.bind(path)
            listening.listen(_BACKLOG)
            server = subprocess.Popen(
                [sys.executable, "-m", "actors.fork_server", str(listening.fileno()), *_OF_RAY, *parts],
                # OpenMP reads that as it is loaded; Ray would set it for an actor.
                env={"OMP_NUM_THREADS": "1"} | os.environ,
                stdin=subprocess.PIPE,
                pass_fds=[listening.fileno()],
                start_new_session=True,
            )
        os.environ[SOCKET] = path
        try:
            yield
        finally:
            del os.environ[SOCKET]
            server.kill()  # it may be importing still; its second floor ends by itself
            server.communicate()
