"""What Ray runs as a worker process where workers are forked: asks the fork server for one, and ends.

A script of the standard library alone, so that it takes hundredths of a second.  Where the server is gone it
becomes what Ray would have run: the worker starts slowly, and says so in its log.
"""

import json
import os
import socket
import sys
from importlib.util import find_spec

SOCKET = "ESPALIER_FORK_SERVER"  # the server's address, in the environment


def ask(path: str) -> bool:
    """Whether a process was forked that goes on in this one's place, with its streams and environment."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        request = [sys.argv[1:], dict(os.environ), os.getcwd()]
        try:
            server.connect(path)
            socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
            return bool(server.recv(1))
        except OSError:
            return False


if __name__ == "__main__" and not ask(os.environ[SOCKET]):
    print("espalier: the fork server is gone: this worker starts by itself", file=sys.stderr, flush=True)
    ray = find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    script = os.path.join(os.path.dirname(ray.origin), "_private", "workers", "setup_worker.py")
    os.execv(sys.executable, [sys.executable, script, *sys.argv[1:]])
