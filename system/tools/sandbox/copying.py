"""Copying a session's directory, which a hostile program may have filled, for a fork of it."""

from __future__ import annotations

import os
import stat
import time

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_DEPTH = 32  # of directories in one another: two descriptors each
_CHUNK = 1 << 20


class NotCopied(Exception):
    """It cannot be copied so that nobody would tell the copy from it, or not in time; says why."""


def copy_tree(source: str, target: str, owner: int | None, until: float) -> None:
    """Copy what is in the directory ``source`` into the empty one ``target``, whose file system bounds it.

    Links stay links, and nothing is followed.  ``owner``: user and group of the copy; ``until``: a time
    (monotonic).  Raises :class:`NotCopied`.
    """
    try:
        copy = _Copy(owner, until)
        copy.newest_first = _newest_first(target)
        copy.directory(source, None, target, None, _MOST_DEPTH)
    except OSError as error:
        raise NotCopied(f"its files cannot be copied: {error.strerror}") from error


class _Copy:
    def __init__(self, owner: int | None, until: float):
        self._owner, self._until = owner, until
        self.newest_first = False  # how the file system lists a directory: programs see an order

    def directory(self, source: str, at: int | None, target: str, to: int | None, depth: int) -> None:
        if not depth:
            raise NotCopied(f"its directories are nested more than {_MOST_DEPTH} deep")
        old = os.open(source, _DIRECTORY, dir_fd=at)
        try:
            new = os.open(target, _DIRECTORY, dir_fd=to)
            try:
                with os.scandir(old) as entries:
                    names = [entry.name for entry in entries]
                for name in reversed(names) if self.newest_first else names:
                    self._entry(name, old, new, depth)
                self._like(os.fstat(old), new)
            finally:
                os.close(new)
        finally:
            os.close(old)

    def _entry(self, name: str, old: int, new: int, depth: int) -> None:
        if time.monotonic() > self._until:
            raise NotCopied("its files take too long to be copied")
        found = os.lstat(name, dir_fd=old)
        if stat.S_ISDIR(found.st_mode):
            os.mkdir(name, 0o700, dir_fd=new)
            self.directory(name, old, name, new, depth - 1)
        elif stat.S_ISLNK(found.st_mode):
            os.symlink(os.readlink(name, dir_fd=old), name, dir_fd=new)
            self._link_like(found, name, new)
        elif stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
            self._file(name, old, new)
        else:
            raise NotCopied("it has a file of two names, or a special one")

    def _file(self, name: str, old: int, new: int) -> None:
        source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=old)
        try:
            target = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=new)
            try:
                while os.sendfile(target, source, None, _CHUNK):
                    if time.monotonic() > self._until:
                        raise NotCopied("its files take too long to be copied")
                self._like(os.fstat(source), target)
            finally:
                os.close(target)
        finally:
            os.close(source)

    def _like(self, found: os.stat_result, new: int) -> None:
        """Owner, mode and times."""
        if self._owner is not None:
            os.chown(new, self._owner, self._owner)
        os.chmod(new, stat.S_IMODE(found.st_mode))
        os.utime(new, ns=(found.st_atime_ns, found.st_mtime_ns))

    def _link_like(self, found: os.stat_result, name: str, new: int) -> None:
        """Owner and times; a link has no mode of its own."""
        if self._owner is not None:
            os.chown(name, self._owner, self._owner, dir_fd=new, follow_symlinks=False)
        times = (found.st_atime_ns, found.st_mtime_ns)
        os.utime(name, ns=times, dir_fd=new, follow_symlinks=False)


def _newest_first(directory: str) -> bool:
    names = ("a", "b")
    for name in names:
        os.mkdir(os.path.join(directory, name))
    listed = tuple(os.listdir(directory))
    for name in names:
        os.rmdir(os.path.join(directory, name))
    return listed != names
