"""Removing a directory that a hostile program has filled."""

from __future__ import annotations

import os
import stat
import time

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(root: str, limit_s: float | None = None) -> bool:
    """Remove ``root`` and everything in it; no error if it does not exist.  Whether it is done: after
    ``limit_s`` seconds it stops, and another call goes on from there.

    Never follows a symbolic link, opens directories that were closed by their mode, and takes any depth of
    nesting: subdirectories are moved up to the top level instead of being walked into.
    """
    until = None if limit_s is None else time.monotonic() + limit_s
    try:
        top = os.open(root, _DIRECTORY)
    except FileNotFoundError:
        return True
    try:
        moved, mark = 0, os.urandom(8).hex()  # a name the program cannot have taken
        pending = ["."]
        while pending:
            name = pending.pop()
            if name != ".":
                os.chmod(name, stat.S_IRWXU, dir_fd=top)
            directory = os.open(name, _DIRECTORY, dir_fd=top)
            try:
                with os.scandir(directory) as entries:
                    found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
                for entry, is_directory in found:
                    if until is not None and time.monotonic() >= until:
                        return False
                    if not is_directory:
                        os.unlink(entry, dir_fd=directory)
                    elif name == ".":
                        pending.append(entry)
                    else:
                        moved += 1
                        os.chmod(entry, stat.S_IRWXU, dir_fd=directory)
                        os.rename(entry, f"{mark}-{moved}", src_dir_fd=directory, dst_dir_fd=top)
                        pending.append(f"{mark}-{moved}")
            finally:
                os.close(directory)
            if name != ".":
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(root)
    return True
