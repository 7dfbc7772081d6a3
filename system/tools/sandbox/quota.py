"""How much a running program has written, where no file system of its own bounds it (Landlock alone).

A warden looks every :data:`PAUSE_S`; what a program can write between two looks is not stopped.  Counted are
the files of its scratch directory, and those that it holds open and has unlinked.  The program
is hostile and changes the tree meanwhile: no symbolic link is followed, a directory closed by its mode is
opened, and what has vanished is not counted.
"""

from __future__ import annotations

import os
import stat

from system.tools.sandbox.settings import SandboxLimits

PAUSE_S = 0.05  # between two looks, at least
SHARE = 4  # and at least so many times what the last look took
_MAX_BRANCHES = 100  # directories with others still to be looked at: each holds a descriptor
_PATH = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class _Full(Exception):
    """A limit is passed; the message says which."""


def excess(scratch: str, pid: int, limits: SandboxLimits) -> str:
    """What process ``pid`` has too much of, in words; "" while it keeps within ``limits``."""
    count = _Count(limits)
    try:
        _walk(scratch, count)
        _unlinked(pid, count)
    except _Full as full:
        return str(full)
    return ""


class _Count:
    def __init__(self, limits: SandboxLimits):
        self._limits = limits
        self._bytes = self._files = 0

    def add(self, found: os.stat_result) -> None:
        self._bytes += found.st_blocks * 512
        self._files += 1
        if self._bytes > self._limits.disk_mb << 20:
            raise _Full(f"the program's files took more than {self._limits.disk_mb} MB")
        if self._files > self._limits.files:
            raise _Full(f"the program made more than {self._limits.files} files and directories")


def _walk(scratch: str, count: _Count) -> None:
    """Count everything below ``scratch``.  A parent is closed with its last child opened, so that a chain of
    any depth takes two descriptors."""
    stack = [(os.open(os.path.dirname(scratch), _PATH), [os.path.basename(scratch)])]
    try:
        while stack:
            parent, names = stack[-1]
            directory = _opened(names.pop(), parent)
            if not names:
                os.close(stack.pop()[0])
            if directory is None:
                continue
            stack.append((directory, []))
            with os.scandir(directory) as entries:
                for entry in entries:
                    try:
                        found = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    count.add(found)
                    if stat.S_ISDIR(found.st_mode):
                        stack[-1][1].append(entry.name)
            if not stack[-1][1]:
                os.close(stack.pop()[0])
            if len(stack) > _MAX_BRANCHES:
                raise _Full(f"the program's directories branch more than {_MAX_BRANCHES} times on one path")
    finally:
        for directory, _ in stack:
            os.close(directory)


def _opened(name: str, parent: int) -> int | None:
    """The directory, to be read; None if it has gone, or has become something else."""
    try:
        path = os.open(name, _PATH, dir_fd=parent)
    except (FileNotFoundError, NotADirectoryError):
        return None
    itself = f"/proc/self/fd/{path}"  # by any other way a symbolic link could take its place meanwhile
    try:
        try:
            return os.open(itself, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except PermissionError:
            os.chmod(itself, stat.S_IRWXU)
            return os.open(itself, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(path)


def _unlinked(pid: int, count: _Count) -> None:
    """Count the open files without a name.  Where the kernel shows them to no one else (a container that may
    not trace), a program's limits on open files and on a file's size bound them."""
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                found = os.stat(f"/proc/{pid}/fd/{name}")
            except FileNotFoundError:
                continue
            if stat.S_ISREG(found.st_mode) and not found.st_nlink:
                count.add(found)
    except (PermissionError, FileNotFoundError):
        return
