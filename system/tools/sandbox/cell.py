"""A file system of the sandbox's own, in mount, network and IPC namespaces.

The fork server builds the *cell* once: a root on tmpfs that holds nothing but read-only binds of Python's
library, the shared libraries and three devices.  Each call then gets a mount namespace of its own with a
fresh, size-limited tmpfs as its scratch directory, which the kernel throws away with the call's last process.
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

    The cell has no /proc; the descriptor returned is that of the host's, with which :func:`enter_call` writes
    id maps.
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


def enter_call(settings: Settings, uid: int | None, proc: int) -> str:
    """Give this process (a call's warden) a mount namespace with an empty scratch directory for ``uid``, and
    its next child a PID namespace.  Returns the scratch directory."""
    _enter(kernel.CLONE_NEWNS | kernel.CLONE_NEWPID, uid, proc)
    mount_scratch(settings, uid, SCRATCH)
    return SCRATCH


def enter_tree(uid: int | None, proc: int) -> str:
    """A mount namespace for the warden of a tree of sessions.  Returns a directory for their scratch
    directories, in which a session can look none of them up."""
    _enter(kernel.CLONE_NEWNS, uid, proc)
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
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | (kernel.MS_NOEXEC if settings.shell is None else 0)
    kernel.mount("scratch", target, "tmpfs", flags, options)


def _enter(flags: int, uid: int | None, proc: int) -> None:
    if uid is None:  # a user namespace per call: RLIMIT_NPROC then counts this call's threads alone
        _unshare_user(flags, proc)
    else:
        kernel.unshare(flags)


def _unshare_user(flags: int, proc: int) -> None:
    """unshare with a user namespace in which this user keeps its own id."""
    uid, gid = os.geteuid(), os.getegid()
    kernel.unshare(flags | kernel.CLONE_NEWUSER)
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
