"""A file system of the sandbox's own, in mount, network and IPC namespaces.

The fork server builds the *cell* once: a root on tmpfs that holds nothing but read-only binds of Python's
library, the shared libraries and three devices.  Each warden of calls then gets a mount namespace with a
size-limited tmpfs as the scratch directory of its programs, one of its own after each that has touched it,
and each program a PID namespace.
Works as root, and as any user where the kernel and its security modules permit user namespaces.
"""

from __future__ import annotations

import contextlib
import os

from system.tools.sandbox import kernel
from system.tools.sandbox.settings import DEVICES, Settings, readable_directories, readable_files

SCRATCH = "/scratch"
GIVEN = "/given"  # what the sessions of a shell may begin with; no command sees it
FILES, TMP = "/files", "/tmp"  # of a shell
OF_SHELL = (FILES, TMP, "/state")
# In the cell it is /dev/full, which reads alike: mapped, the other one is memory that no limit counts.
ZEROS = "/dev/zero"
_READ_ONLY = kernel.ATTR_RDONLY | kernel.ATTR_NOSUID


def build(settings: Settings) -> int:
    """Move this (single-threaded) process into new namespaces whose root is the cell.  Raises OSError.

    The cell has no /proc; the descriptor returned is that of the host's, with which wardens write id maps.
    """
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    flags = kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
    if os.geteuid() == 0:
        kernel.unshare(flags)
    else:
        _unshare_user(flags, proc)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    root = settings.base
    kernel.mount("cell", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=0755,size=1m")
    for directory in readable_directories(settings):
        if os.path.islink(directory):  # /lib -> usr/lib on merged-/usr systems
            os.symlink(os.readlink(directory), _inside(root, directory))
        else:
            os.makedirs(_inside(root, directory), exist_ok=True)
            _bind(directory, _inside(root, directory), _READ_ONLY | kernel.ATTR_NODEV)
    files = {file: file for file in (*readable_files(settings), *DEVICES)} | {ZEROS: "/dev/full"}
    for name, file in files.items():
        if os.path.exists(file):
            target = _inside(root, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "x"):
                pass
            library = kernel.ATTR_NODEV if file in settings.readable else kernel.ATTR_NOEXEC
            _bind(file, target, _READ_ONLY | library)
    os.mkdir(root + SCRATCH)
    if settings.shell is not None:
        for directory in (*OF_SHELL, GIVEN):
            os.mkdir(root + directory)
        if settings.shell.given:
            _bind(settings.shell.given, root + GIVEN, _READ_ONLY | kernel.ATTR_NODEV)
    kernel.pivot_root(root)
    kernel.mount_attributes("/", _READ_ONLY, recursive=False)
    return proc


def fork_warden(*, root: bool) -> int:
    """Fork a warden of calls, as the first process of a PID namespace, with a mount namespace of its own.
    Unless it is ``root`` it has a user namespace as well, and no id in it before :func:`keep_ids`.

    It may start no thread (:func:`.kernel.fork_first`).
    """
    return kernel.fork_first(kernel.CLONE_NEWNS | (0 if root else kernel.CLONE_NEWUSER))


def fork_program(own_pids: int) -> int:
    """Fork, as the first process of a new PID namespace.  ``own_pids``: a descriptor of this process's own
    one, to which it could not return if it did not own it."""
    kernel.unshare(kernel.CLONE_NEWPID)
    if pid := os.fork():
        kernel.enter_namespace(own_pids, kernel.CLONE_NEWPID)
    return pid


def enter_tree(uid: int | None, proc: int) -> str:
    """A mount namespace for the warden of a tree of sessions.  Returns a directory for their scratch
    directories, in which a session can look none of them up."""
    if uid is None:  # a user namespace as well: RLIMIT_NPROC then counts this tree's tasks alone
        _unshare_user(kernel.CLONE_NEWNS, proc)
    else:
        kernel.unshare(kernel.CLONE_NEWNS)
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("sessions", SCRATCH, "tmpfs", flags, "mode=0111,size=1m")
    return SCRATCH


def enter_command(home: str) -> None:
    """A mount namespace for one command of a shell, which sees the directories of its session's ``home`` and
    no other session's, and for this process's next child a PID namespace."""
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWPID)
    for directory in OF_SHELL:
        kernel.mount(home + directory, directory, None, kernel.MS_BIND)
    for hidden in (SCRATCH, GIVEN):
        with contextlib.suppress(OSError):  # nothing is mounted there
            kernel.unmount(hidden)


def mount_scratch(settings: Settings, uid: int | None, target: str) -> None:
    """An empty directory of limited size for ``uid``, over the directory ``target``.  Programs in it run only
    where there are others to run."""
    owner = "" if uid is None else f",uid={uid},gid={uid}"
    size = settings.limits.disk_mb << 20
    options = f"mode=0700,size={size},nr_inodes={settings.limits.files}{owner}"
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOATIME
    flags |= kernel.MS_NOEXEC if settings.shell is None else 0
    kernel.mount("scratch", target, "tmpfs", flags, options)


def _unshare_user(flags: int, proc: int) -> None:
    """unshare with a user namespace in which this user keeps its own id."""
    uid, gid = os.geteuid(), os.getegid()
    kernel.unshare(flags | kernel.CLONE_NEWUSER)
    keep_ids(uid, gid, proc)


def keep_ids(uid: int, gid: int, proc: int) -> None:
    """Let this process's ids be in its new user namespace what they were outside."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        handle = os.open(f"self/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            os.write(handle, text.encode())
        finally:
            os.close(handle)


def _inside(root: str, path: str) -> str:
    return root + os.path.abspath(path)


def _bind(source: str, target: str, attributes: int) -> None:
    kernel.mount(source, target, None, kernel.MS_BIND | kernel.MS_REC)
    kernel.mount_attributes(target, attributes, recursive=True)
