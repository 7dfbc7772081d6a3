"""The last thing a child does before it runs the model's code: give up, for good, what it does not need."""

from __future__ import annotations

import math
import os
import resource
import select
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from system.tools.sandbox import cell, kernel, seccomp
from system.tools.sandbox.settings import (
    DEVICES,
    SYSTEM_FILES,
    SYSTEM_LIBRARIES,
    Settings,
    readable_directories,
    readable_files,
)

MAX_DESCRIPTORS = 1000  # of the fork server and its wardens; select takes no more than 1024

# Access rights of Landlock (linux/landlock.h); the ABI version in which each group appeared decides what is
# handled.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
# All rights to files by ABI version: 2 adds REFER, 3 TRUNCATE, 5 IOCTL_DEV.
_ALL_FS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_NET_TCP = 0b11  # bind, connect (ABI 4)
_SCOPES = 0b11  # abstract UNIX sockets, signals (ABI 6)
_READ = _READ_FILE | _READ_DIR | _EXECUTE

# Beyond what anyone assigns, below 2^31: some for each warden, whose process id is below 2^22.
_OWN_UIDS, _WARDENS, _UIDS_OF_WARDEN = 0x70000000, 1 << 22, 1 << 6
_NOBODY = 65534
# Stands for the program's own process id in the prepared filter; no real one is as large.
_ANY_PID = 0x7F0A1B2C


@dataclass(frozen=True)
class Confinement:
    """What was found out once, at the fork server's start, about how to confine a call on this machine."""

    settings: Settings
    landlock: int  # ABI version, 0: none
    readable: tuple[tuple[int, int], ...]  # (O_PATH descriptor, Landlock rights) of what any program may read
    syscalls: bytes  # the seccomp filter, for process id _ANY_PID
    session_syscalls: bytes  # a session's, and what leaves its forks to its warden
    session_forks: bytes
    shell_syscalls: bytes
    first_uid: int | None  # user id to drop to, see _unprivileged_uid; None: we are not root
    proc: int  # descriptor of the host's /proc, -1 outside a cell
    ids: tuple[int, int]  # user and group of the fork server

    def uid(self, call: int = 0) -> int | None:
        """The user id for a call, by its number, of the warden that this process is: where there are enough,
        no other program alive has it, nor had any of the calls just before."""
        if self.first_uid != _OWN_UIDS:
            return self.first_uid
        pid = os.getpid() if self.proc < 0 else int(os.readlink("self", dir_fd=self.proc))
        return _OWN_UIDS + pid % _WARDENS * _UIDS_OF_WARDEN + call % _UIDS_OF_WARDEN

    def mechanisms(self) -> list[str]:
        """What confines a call here, for logs and reports."""
        found = ["seccomp"]
        found += [f"Landlock (ABI {self.landlock})"] if self.landlock else []
        found += ["namespaces (mount, network, IPC, PID)"] if self.settings.namespaces else []
        found += ["unprivileged user id"] if self.first_uid else []
        return found


def prepare(settings: Settings) -> Confinement:
    """Look at the kernel, and build the cell if the settings ask for one.  Raises OSError with the reason."""
    if not seccomp.supported(kernel.MACHINE):
        raise OSError(f"no seccomp table for {kernel.MACHINE}")
    _limit_all(settings)
    landlock = kernel.landlock_version()
    if not landlock and not settings.namespaces:
        raise OSError("no Landlock in this kernel: nothing would keep a program from writing elsewhere")
    proc = cell.build(settings) if settings.namespaces else -1
    return Confinement(
        settings=settings,
        landlock=landlock,
        readable=tuple(_readable(settings)) if landlock else (),
        syscalls=seccomp.program(kernel.MACHINE, _ANY_PID),
        session_syscalls=seccomp.session_program(kernel.MACHINE),
        session_forks=seccomp.fork_program(kernel.MACHINE),
        shell_syscalls=seccomp.shell_program(kernel.MACHINE),
        first_uid=_unprivileged_uid(settings),
        proc=proc,
        ids=(os.geteuid(), os.getegid()),
    )


def confine(confinement: Confinement, scratch: str, ruleset: int, uid: int | None, leash: int) -> None:
    """Confine this process to ``scratch``, for good.  Raises OSError if any part of it fails.

    It must be single-threaded.  ``ruleset``: of :func:`landlock_ruleset` for ``scratch``.  Its descriptors
    above 2 are closed, all but ``leash``, a socket whose other end its parent holds: the process dies with
    its parent, even when that died before it could ask for this.
    """
    limits = confinement.settings.limits
    os.chdir(scratch)
    _limit(resource.RLIMIT_CPU, math.ceil(limits.cpu_s))
    _limit(resource.RLIMIT_NPROC, limits.threads + _foreign_tasks(confinement, uid))
    if uid:
        _become(uid)
    kernel.die_with_parent(signal.SIGKILL)  # after the change of user, which would clear it
    if select.select([leash], [], [], 0)[0]:
        raise ProcessLookupError("the warden is gone")
    _enclose(confinement, ruleset, leash)
    own = os.getpid().to_bytes(4, sys.byteorder)
    kernel.install_filter(confinement.syscalls.replace(_ANY_PID.to_bytes(4, sys.byteorder), own))


def confine_session(
    confinement: Confinement,
    directories: str,
    home: str,
    uid: int | None,
    control: int,
    listen: Callable[[int], None],
) -> None:
    """The same for a session, whose forks will be confined alike and have other homes in ``directories``,
    and whose CPU time its warden measures, cell by cell.  It is the child of a PID namespace's first process
    and dies with that.  Its forks are asked for at a descriptor, given to ``listen``.
    """
    limits = confinement.settings.limits
    os.chdir(home)
    tasks = limits.threads * limits.branches + 1  # all sessions of the tree, and the first process
    _limit(resource.RLIMIT_NPROC, tasks + _foreign_tasks(confinement, uid))
    if uid:
        _become(uid)
    _enclose(confinement, landlock_ruleset(confinement, directories), control)
    listener = kernel.install_listened_filter(confinement.session_forks)
    listen(listener)
    os.close(listener)
    kernel.install_filter(confinement.session_syscalls)


def confine_command(confinement: Confinement, uid: int | None, leash: int) -> None:
    """The same for a command of a shell, which starts programs, in the namespaces of
    :func:`.cell.enter_command`.  Its processes are counted, and their memory and time, by its warden."""
    limits = confinement.settings.limits
    os.chdir(cell.FILES)  # as whoever may: an earlier command may have closed it to its user
    _limit(resource.RLIMIT_CPU, math.ceil(limits.cpu_s))
    _limit(resource.RLIMIT_NPROC, limits.threads * limits.branches + _foreign_tasks(confinement, uid))
    if uid:
        _become(uid)
    _enclose(confinement, landlock_ruleset(confinement, *cell.OF_SHELL), leash)
    kernel.install_filter(confinement.shell_syscalls)


def _enclose(confinement: Confinement, ruleset: int, kept: int) -> None:
    """Keep this process to its directories and from all privileges, and close and bound its descriptors."""
    os.umask(0o077)
    kernel.no_new_privileges()
    if confinement.landlock:
        kernel.landlock_restrict(ruleset)
    kernel.drop_capabilities()
    os.closerange(3, kept)
    os.closerange(kept + 1, MAX_DESCRIPTORS)
    # Not before: it bounds the number of a new descriptor, and the warden's have been inherited.
    _limit(resource.RLIMIT_NOFILE, confinement.settings.limits.open_files)


def landlock_ruleset(confinement: Confinement, *writable: str) -> int:
    """Read Python's library, write only beneath what is ``writable``; no TCP, no signal or abstract socket to
    the outside.  Returns a descriptor, -1 where the kernel has no Landlock.  Raises OSError."""
    version = confinement.landlock
    if not version:
        return -1
    handled = _ALL_FS[max(v for v in _ALL_FS if v <= version)]
    ruleset = kernel.landlock_ruleset(
        handled, _NET_TCP if version >= 4 else 0, _SCOPES if version >= 6 else 0
    )
    for handle, rights in confinement.readable:
        kernel.landlock_allow(ruleset, handle, rights)
    for directory in writable:
        handle = os.open(directory, os.O_PATH | os.O_CLOEXEC)
        kernel.landlock_allow(ruleset, handle, handled)
        os.close(handle)
    return ruleset


def _readable(settings: Settings) -> Iterator[tuple[int, int]]:
    rights = dict.fromkeys(readable_directories(settings), _READ)
    rights |= dict.fromkeys(readable_files(settings), _READ_FILE)
    devices = (*DEVICES, cell.ZEROS) if settings.namespaces else DEVICES
    rights |= dict.fromkeys(devices, _READ_FILE | _WRITE_FILE)
    for path, allowed in rights.items():
        if os.path.exists(path):
            yield os.open(path, os.O_PATH | os.O_CLOEXEC), allowed
    if settings.shell is not None:  # what stands where, of a file system that has nothing but these
        yield os.open("/", os.O_PATH | os.O_CLOEXEC), _READ_DIR


def _limit_all(settings: Settings) -> None:
    """Limits that the fork server and the wardens can live under, too, and that every program inherits."""
    limit_memory(settings.limits.memory_mb)
    _limit(resource.RLIMIT_FSIZE, settings.limits.file_mb << 20)
    _limit(resource.RLIMIT_NOFILE, MAX_DESCRIPTORS)
    _limit(resource.RLIMIT_STACK, 8 << 20)
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE):
        _limit(kind, 0)


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _foreign_tasks(confinement: Confinement, uid: int | None) -> int:
    """A bound on the tasks that RLIMIT_NPROC counts for our user id and that are not the call's.

    With a user id of the call's own, or a user namespace of its warden's, there is at most the warden.
    Otherwise the same user's other processes count as well; the number of all tasks on the machine bounds
    them at no cost.
    """
    if confinement.settings.namespaces or (uid or 0) >= _OWN_UIDS:
        return 1
    with open("/proc/loadavg") as file:
        return int(file.read().split()[3].split("/")[1])


def _unprivileged_uid(settings: Settings) -> int | None:
    """A user id to drop to, or None when we are not root.

    One of our own per call where such ids exist, else ``nobody``, else (0) our own without its capabilities:
    an interpreter below a closed /root can be read by nobody else.
    """
    if os.geteuid() != 0:
        return None
    return next((uid for uid in (_OWN_UIDS, _NOBODY) if _can_read_library_as(uid)), 0)


def _become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _can_read_library_as(uid: int) -> bool:
    child = os.fork()
    if child == 0:
        try:
            _become(uid)
            with open(os.__file__, "rb") as file:
                file.read(1)
            os._exit(0)
        except OSError:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def limit_memory(memory_mb: int) -> None:
    """Let this process take ``memory_mb`` of address space beyond what it has."""
    with open("/proc/self/statm") as file:
        idle = int(file.read().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_AS, idle + (memory_mb << 20))


def confine_scorer(memory_mb: int, must: bool) -> None:
    """Confine this process, a scorer with its libraries loaded, for good: it reads what Python imports from,
    writes nothing, has no network, starts and signals no process.

    Raises OSError if any part of it fails; ``reward.confined=false`` does without.  Unless it ``must`` be
    confined, a kernel that cannot do it is no failure: only its memory is limited then.
    """
    version = kernel.landlock_version()
    if not version or not seccomp.supported(kernel.MACHINE):
        if not must:
            return limit_memory(memory_mb)
        raise OSError("no Landlock or no seccomp table here to confine a reward with: reward.confined=false")
    if len(os.listdir("/proc/self/task")) > 1:
        raise OSError("the reward has started threads, which cannot be confined: reward.confined=false")
    limit_memory(memory_mb)
    _limit(resource.RLIMIT_FSIZE, 0)
    handled = _ALL_FS[max(v for v in _ALL_FS if v <= version)]
    ruleset = kernel.landlock_ruleset(
        handled, _NET_TCP if version >= 4 else 0, _SCOPES if version >= 6 else 0
    )
    readable = {path for path in (*sys.path, sys.prefix, sys.base_prefix, *SYSTEM_LIBRARIES) if path}
    rights = dict.fromkeys(readable, _READ) | dict.fromkeys((*SYSTEM_FILES, *DEVICES), _READ_FILE)
    for path, allowed in rights.items():
        if os.path.exists(path):
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            kernel.landlock_allow(ruleset, handle, allowed if os.path.isdir(path) else _READ_FILE)
            os.close(handle)
    kernel.no_new_privileges()
    kernel.landlock_restrict(ruleset)
    os.close(ruleset)
    kernel.drop_capabilities()
    kernel.install_filter(seccomp.program(kernel.MACHINE, os.getpid()))
