"""What Ray runs as a worker process where workers are forked: asks the fork server for one, and ends.

A script of the standard library alone, so that it takes hundredths of a second.  Where the server is gone,
does not answer or will not, it becomes what Ray would have run: the worker starts slowly, and says so in its
log.  The first of them says so to the driver as well, in a file that keeps the others from asking.
"""

import contextlib
import json
import os
import resource
import socket
import sys
from importlib.util import find_spec

SOCKET = "ESPALIER_FORK_SERVER"  # the directory of the server's socket, in the environment
NAME = "fork"  # of the socket in it
FAILED = "failed"  # a file beside it: why a worker had to start by itself
# The server may be importing still, on cores that are not its alone.
DEADLINE_S = 45.0
FORKED, GO = b"F", b"G"  # what the forked process says when it is ready, and what it is answered


def address(directory: int) -> str:
    """The socket in the open ``directory``, whose own path may be longer than an address (107 bytes)."""
    return f"/proc/self/fd/{directory}/{NAME}"


def request() -> bytes:
    """All that the forked process has to take from this one, but for the streams."""
    names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    with open("/proc/self/oom_score_adj") as file:
        oom_score_adj = int(file.read())
    told = {
        "arguments": sys.argv[1:],
        "environment": {name: value for name, value in os.environ.items() if name != SOCKET},
        "directory": os.getcwd(),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in names},
        "oom_score_adj": oom_score_adj,
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
    }
    return json.dumps(told).encode()


def ask(directory: int, deadline_s: float = DEADLINE_S) -> str:
    """Let a process be forked that goes on in this one's place, with its output and environment; returns why
    there is none, nothing where there is.

    It goes on only when it is told to, so there are never two of them.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.settimeout(deadline_s)
        try:
            server.connect(address(directory))
            socket.send_fds(server, [request()], [1, 2])
            if server.recv(1) != FORKED:
                return "the fork server has refused"
            server.send(GO)
        except TimeoutError:
            return f"the fork server has not answered within {deadline_s:.0f} s"
        except OSError as error:
            return f"the fork server does not answer ({error})"
    return ""


def main() -> None:
    why = _settled(os.environ[SOCKET])
    if not why:
        return
    print(f"espalier: {why}: this worker starts by itself", file=sys.stderr, flush=True)
    del os.environ[SOCKET]
    ray = find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    script = os.path.join(os.path.dirname(ray.origin), "_private", "workers", "setup_worker.py")
    os.execv(sys.executable, [sys.executable, script, *sys.argv[1:]])


def _settled(path: str) -> str:
    """Why this worker has to start by itself, of which the driver is told; nothing where it has not to."""
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        return f"the fork server is gone ({error})"
    try:
        if _exists(directory):
            return "the fork server has failed before"
        if why := ask(directory):
            with contextlib.suppress(OSError):  # another was first; or the run has ended
                file = os.open(FAILED, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)
                os.write(file, why.encode())
                os.close(file)
        return why
    finally:
        os.close(directory)


def _exists(directory: int) -> bool:
    """Whether a worker before this one has had to start by itself."""
    try:
        os.stat(FAILED, dir_fd=directory)
    except FileNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
