"""The helper process that forks wardens, which fork confined programs: faster than starting interpreters.

Three kinds of process::

    Sandbox (asyncio) ──control──► fork server ──fork──► warden ──fork──► the model's program
          └────────── a channel per warden ───────────────┘

The control channel (SOCK_SEQPACKET) carries one message per warden: a byte that says of which kind, with the
warden's own channel attached: one of calls (:mod:`.call_warden`), or of a tree of sessions
(:mod:`.tree_warden`, :mod:`.shell_warden`).  A warden ends with its channel.  When the control channel
closes, the fork server ends.  It never sees what programs do or say, so no warden inherits anything of that.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
from contextlib import suppress

from system.tools.sandbox import kernel, lockdown
from system.tools.sandbox.call_warden import CallWarden
from system.tools.sandbox.packages import Finder
from system.tools.sandbox.process import end_with
from system.tools.sandbox.scratch import remove_tree
from system.tools.sandbox.settings import Settings
from system.tools.sandbox.shell_warden import ShellWarden
from system.tools.sandbox.tree_warden import TreeWarden

# Libraries that start threads when they are imported: the fork server has to stay single-threaded.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def main() -> None:
    """``python … main`` with the control socket's descriptor and the settings as arguments."""
    control = socket.socket(fileno=int(sys.argv[2]))
    settings = Settings.from_json(sys.argv[3])
    try:
        confinement = _prepare(settings)
    except Exception as error:  # whatever it is, the parent must hear of it
        control.send(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())
        return
    control.send(json.dumps({"ready": confinement.mechanisms()}).encode())
    try:
        _serve(control, confinement)
    finally:
        control.close()  # whatever ended it, the parent asks another one from now on
        _wait_for_wardens()
        if not settings.namespaces:
            remove_tree(settings.base)


def _prepare(settings: Settings) -> lockdown.Confinement:
    kernel.set_name("sandbox-server")
    sys.dont_write_bytecode = True
    sys.argv = [""]
    os.environ.clear()  # the start of this process set more than the programs need to see
    os.environ.update(PATH="/usr/bin:/bin", LANG="C.UTF-8", TZ="UTC")
    if settings.modules:
        os.environ.update(_ONE_THREAD)
    sys.path += settings.paths
    sys.meta_path.append(Finder(settings.modules))
    for name in settings.preload:
        importlib.import_module(name)
    confinement = lockdown.prepare(settings)
    gc.collect()
    gc.freeze()  # a child that collects garbage should not copy the pages of what it will never free
    return confinement


def _serve(control: socket.socket, confinement: lockdown.Confinement) -> None:
    signal.signal(signal.SIGCHLD, _reap)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 16, 1)
        if not message:
            return
        warden = _WARDENS[message]
        with socket.socket(fileno=descriptors[0]) as channel:
            try:
                pid = warden.fork(confinement)
            except OSError as error:  # no process to be had: that call has failed, and no other
                with suppress(OSError):  # its caller has gone
                    told = {"failed": f"{type(error).__name__}: {error}"}
                    channel.send(json.dumps(told).encode() + b"\n")
                continue
            if pid == 0:
                control.close()
                end_with(warden(confinement, channel).serve)


def _reap(*_: object) -> None:
    """Take note of the wardens that have ended.  Were they ignored, their processor time, and that of the
    programs, would be nobody's: what a run uses would look like others' work beside it.
    """
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _wait_for_wardens() -> None:
    """They end by themselves: whoever closed the control channel closes, or has lost, the calls' sockets."""
    with suppress(ChildProcessError):
        while True:
            os.wait()


_WARDENS: dict[bytes, type[CallWarden] | type[TreeWarden] | type[ShellWarden]] = {
    b"c": CallWarden,
    b"t": TreeWarden,
    b"s": ShellWarden,
}
