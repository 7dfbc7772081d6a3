"""The warden of one tree of shells: directories that keep what commands did, and are copied.

::

    Sandbox ──control──► fork server ──fork──► shell warden ─fork─► runner ─fork─► process 1 ─fork─► bash
       └────── a channel per tree ────────────────┘ └──────── for each command ───────┘

Calls are those of :mod:`.session_warden`; ``open {given, files}`` says what a session begins with.

A session is a file system of limited size with three directories: ``/files``, ``/tmp``, and ``/state``, which
has the working directory, variables and functions of the last command.  Nothing runs between two commands:
each has a PID namespace of its own, whose end ends all that it started.  So a fork is a copy of files.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from system.tools.sandbox import cell, kernel, lockdown, transport
from system.tools.sandbox.copying import NotCopied
from system.tools.sandbox.process import end_with
from system.tools.sandbox.session_warden import Refused, SessionWarden
from system.tools.sandbox.watch import Ending, Output, watch

_BEGINS_S, _DIES_S, _FILES_S = 5.0, 5.0, 30.0
_FIRST_LOOK_S, _LOOK_S, _LOOK_SHARE = 0.2, 0.05, 4  # a look at all processes takes milliseconds
_ARGUMENT = 32_000  # characters of one argument of a program: Linux takes 128 kB
# The next command finds the variables and functions as this one left them.  Bash's own come anew; a read-only
# one could not be set again.
_KEEP = """() {
    pwd -P > /state/cwd
    local _espalier_name
    for _espalier_name in $(compgen -A variable); do
        case $_espalier_name in
            BASH*|COMP_*|DIRSTACK|EPOCH*|FUNCNAME|GROUPS|HIST*|LINENO|OPT*|PIPESTATUS|PPID|PWD|OLDPWD) ;;
            RANDOM|SECONDS|SHELLOPTS|SHLVL|SRANDOM|UID|EUID|_|_espalier_*) ;;
            *) [[ ${!_espalier_name@a} == *r* ]] || declare -p "$_espalier_name" 2> /dev/null ;;
        esac
    done > /state/variables
    unset -f _espalier_keep
    declare -f > /state/functions
}"""
# One line, so that bash counts the lines of the command itself.
_BEGIN = (
    'export -nf _espalier_keep; trap _espalier_keep EXIT; printf -v _espalier_command %s "$@"; set --; '
    'if [ -f /state/cwd ]; then cd -- "$(< /state/cwd)" 2> /dev/null; fi; '
    "if [ -f /state/variables ]; then . /state/variables 2> /dev/null; fi; "
    "if [ -f /state/functions ]; then . /state/functions; fi; "
    'eval "$_espalier_command"'
)


@dataclass
class _Shell:
    """A session."""

    home: str
    lock: threading.Lock = field(default_factory=threading.Lock)
    dead: bool = False


class ShellWarden(SessionWarden[_Shell]):
    """See the module."""

    def __init__(self, confinement: lockdown.Confinement, channel: socket.socket):
        super().__init__(confinement, channel)
        self.beginning = threading.Lock()  # of one command at a time

    def serve(self) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        kernel.set_name("sandbox-shells")
        self._directories = cell.enter_tree(self.uid, self.confinement.proc)
        self._serve_calls()

    # Beginning and end

    def _open(self, request: dict[str, Any]) -> str:
        with self._room():
            home = self._new_home()
            try:
                for directory in cell.OF_SHELL:
                    os.mkdir(home + directory, 0o700)
                    self._own(home + directory)
                if given := request.get("given"):
                    until = time.monotonic() + _FILES_S
                    self._copy(f"{cell.GIVEN}/{given}", home + cell.FILES, until)
                if files := request.get("files"):
                    self._write(home, files)
                return self._added(home)
            except BaseException as error:
                self._remove(home)
                if isinstance(error, NotCopied):
                    raise Refused(f"the directory {request['given']!r}: {error}") from error
                raise

    def _added(self, home: str) -> str:
        name = os.path.basename(home)
        with self._lock:
            self._sessions[name] = _Shell(home)
        return name

    def _kill(self, live: _Shell) -> None:
        live.dead = True
        with self._lock:
            del self._sessions[os.path.basename(live.home)]
        self._remove(live.home)

    def _own(self, path: str) -> None:
        if self.uid is not None:
            os.chown(path, self.uid, self.uid)

    def _write(self, home: str, files: dict[str, str]) -> None:
        """Files of a question, written from inside: a path that leads elsewhere leads nowhere."""

        def write() -> None:
            for path, text in files.items():
                os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
                with open(path, "w", encoding="utf-8") as file:
                    file.write(text)

        running = _Running(self, home, write)
        ends = {running.pidfd: Ending("exited")}
        watch(ends, running.output.captures, time.monotonic() + _FILES_S, None)
        if running.end().exit_code:
            said = running.output.told()["stderr"]
            raise Refused(f"the files of the question could not be written: {said}")

    # A command

    def _run(self, live: _Shell, request: dict[str, Any], call: socket.socket) -> dict[str, Any] | None:
        began = time.monotonic()
        code, begin = request["code"], _BEGIN if not request["fresh"] else 'eval "$(printf %s "$@")"'
        running = _Running(self, live.home, lambda: _become_bash(begin, code))
        ends = {running.pidfd: Ending("exited"), call.fileno(): Ending("abandoned")}
        ending = Ending("abandoned")
        try:
            ending = watch(ends, running.output.captures, began + request["wall_s"], running.look)
        finally:
            ended = running.end()
            if broken := ending.how != "exited":
                self._kill(live)  # what it had done by then is a matter of chance
        if ending.how == "abandoned":
            return None
        return {
            "exit_code": -signal.SIGKILL if ending.how == "cpu" else ended.exit_code,
            "ended": broken,
            "timed_out": ending.how == "deadline",
            "excess": ending.told,
            "held_mb": 0.0 if broken else _used_mb(live.home),
            "wall_s": time.monotonic() - began,
            "cpu_s": max(ended.cpu_s, running.used_s),
            "peak_rss_mb": ended.peak_mb,
            **running.output.told(),
        }

    # A fork

    def _fork(self, live: _Shell, until: float) -> dict[str, Any]:
        with self._room():
            home = self._new_home()
            try:
                self._copy(live.home, home, until)
                return {"session": self._added(home), "held_mb": _used_mb(home)}
            except NotCopied as refusal:
                self._remove(home)
                return {"refused": str(refusal), "ended": False}


@dataclass(frozen=True)
class _End:
    exit_code: int
    cpu_s: float
    peak_mb: float


class _Running:
    """Processes of one command, seen from outside."""

    def __init__(self, warden: ShellWarden, home: str, action: Callable[[], None]):
        """Run ``action``, confined, in the session of ``home``.  Raises Refused where it cannot be."""
        self._limits, self._looks = warden.limits, warden.looks
        self.used_s = 0.0  # of CPU, as far as it was seen
        self._began = time.monotonic()
        with warden.beginning:  # another runner would inherit the ends that are given to this one
            self.output = Output(self._limits.output_chars)
            try:
                self._pipe, theirs = socket.socketpair()
                self._runner = os.fork()
            except OSError:
                self.output.close_given()
                self.output.drain()
                raise
            if self._runner == 0:
                self._pipe.close()
                end_with(lambda: _Runner(warden, home, self.output.given, theirs).run(action))
            self.output.close_given()
            theirs.close()
        self._pipe.settimeout(_BEGINS_S)
        try:
            told = transport.receive(self._pipe, transport.ANSWER_BYTES)
            if "failed" in told.values:
                raise Refused(f"a command could not be confined: {told.values['failed']}")
            self._pid, (self.pidfd,) = int(told.values["pid"]), told.descriptors
        except BaseException as error:
            self._reap()
            if isinstance(error, OSError | ValueError):
                raise Refused(f"a command's process did not begin: {error}") from error
            raise

    def look(self) -> tuple[Ending | None, float]:
        """Whether its processes together have too much of something."""
        began = time.monotonic()
        if began < self._began + _FIRST_LOOK_S:
            return None, _FIRST_LOOK_S
        seen = self._looks.family(self._pid)
        self.used_s, limits = max(self.used_s, seen.cpu_s), self._limits
        pause_s = max(_LOOK_S, _LOOK_SHARE * (time.monotonic() - began))
        if seen.threads > limits.threads:
            return Ending("filled", f"the command ran more than {limits.threads} processes and threads"), 0.0
        if seen.memory_mb > limits.memory_mb:
            return Ending("filled", f"its processes took more than {limits.memory_mb} MB of memory"), 0.0
        return (Ending("cpu") if seen.cpu_s > limits.cpu_s else None), pause_s

    def end(self) -> _End:
        """End whatever of it still runs; returns when all is gone."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        select.select([self.pidfd], [], [], _DIES_S)
        os.close(self.pidfd)
        try:
            told = transport.receive(self._pipe, transport.ANSWER_BYTES).values
            return _End(int(told["exit_code"]), float(told["cpu_s"]), float(told["peak_mb"]))
        except (OSError, ValueError):
            return _End(1, 0.0, 0.0)
        finally:
            self._reap()

    def _reap(self) -> None:
        self._pipe.close()
        with suppress(ProcessLookupError):
            os.kill(self._runner, signal.SIGKILL)
        os.waitpid(self._runner, 0)
        self.output.drain()


class _Runner:
    """The process between a warden and a command's process 1: it has that one's namespaces, and waits."""

    def __init__(self, warden: ShellWarden, home: str, given: tuple[int, int], pipe: socket.socket):
        self.confinement, self.uid = warden.confinement, warden.uid
        self._home, self._given, self._pipe = home, given, pipe

    def run(self, action: Callable[[], None]) -> None:
        kernel.set_name("sandbox-runner")
        kernel.die_with_parent(signal.SIGKILL)
        os.setsid()
        try:
            cell.enter_command(self._home)
            ours, leash = socket.socketpair()
            first = os.fork()
        except OSError as error:
            return transport.send(self._pipe, {"failed": str(error)})
        if first == 0:
            ours.close()
            self._pipe.close()
            end_with(lambda: self._first_process(action, leash))
        leash.close()
        ours.settimeout(_BEGINS_S)
        if failure := ours.recv(4096):  # its end: the command is confined, and begins
            transport.send(self._pipe, {"failed": failure.decode(errors="replace")})
            return
        handle = os.pidfd_open(first)
        transport.send(self._pipe, {"pid": first}, [handle])
        for descriptor in (*self._given, handle):  # an end of output that we held would never come
            os.close(descriptor)
        _, status, used = os.wait4(first, 0)
        code = os.waitstatus_to_exitcode(status)
        cpu_s, peak_mb = used.ru_utime + used.ru_stime, used.ru_maxrss / 1024
        transport.send(self._pipe, {"exit_code": code, "cpu_s": cpu_s, "peak_mb": peak_mb})

    def _first_process(self, action: Callable[[], None], leash: socket.socket) -> None:
        """Process 1 of the command's PID namespace: with its end the kernel ends all that is left in it."""
        kernel.set_name("sandbox-shell-1")
        kernel.die_with_parent(signal.SIGKILL)
        command = os.fork()
        if command == 0:
            end_with(lambda: self._command(action, leash))
        leash.close()
        for descriptor in self._given:
            os.close(descriptor)
        while True:
            pid, status = os.wait()
            if pid == command:
                code = os.waitstatus_to_exitcode(status)
                os._exit(code if code >= 0 else 128 - code)  # as a shell tells a signal

    def _command(self, action: Callable[[], None], leash: socket.socket) -> None:
        os.setsid()
        kernel.set_name("sandbox-command")
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), *zip(self._given, (1, 2), strict=True)):
            os.dup2(source, target)
        try:
            lockdown.confine_command(self.confinement, self.uid, leash.fileno())
        except Exception as error:  # whatever it is, the command must not run, and its warden must hear why
            leash.send(f"{type(error).__name__}: {error}".encode())
            raise
        leash.close()
        shell = self.confinement.settings.shell
        assert shell is not None
        own = [os.path.join(directory, "bin") for directory in (*shell.readable, sys.base_prefix)]
        os.environ.clear()
        os.environ.update(
            PATH=":".join(dict.fromkeys([*own, "/usr/local/bin", "/usr/bin", "/bin"])),
            HOME=cell.FILES,
            TMPDIR=cell.TMP,
            LANG="C.UTF-8",
            TZ="UTC",
            PYTHONHASHSEED="0",
            PYTHONDONTWRITEBYTECODE="1",
            **{
                f"GIT_{who}_NAME": "agent" for who in ("AUTHOR", "COMMITTER")
            },  # git takes no commit from nobody
            **{f"GIT_{who}_EMAIL": "agent@localhost" for who in ("AUTHOR", "COMMITTER")},
        )
        action()


def _become_bash(begin: str, code: str) -> None:
    code = code.encode(errors="replace").decode().replace("\0", "")
    parts = [code[at : at + _ARGUMENT] for at in range(0, len(code), _ARGUMENT)]
    environment = os.environ | {"BASH_FUNC__espalier_keep%%": _KEEP}  # as bash exports a function
    os.execve("/bin/bash", ["bash", "--noprofile", "--norc", "-c", begin, "bash", *parts], environment)


def _used_mb(home: str) -> float:
    found = os.statvfs(home)
    return (found.f_blocks - found.f_bfree) * found.f_frsize / (1 << 20)
