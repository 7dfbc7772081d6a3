"""Directories that appear whole: while they are filled they have another name, for which nobody looks."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Generator
from pathlib import Path

from system.errors import naming


@contextlib.contextmanager
def appearing(path: Path) -> Generator[Path]:
    """An empty directory, to be filled in the block, that is ``path`` at its end, in place of an older one.

    What an error or a kill leaves half full, ``<name>.partial``, goes at the next try.  Errors of the file
    system that name no file name that.
    """
    partial = path.with_name(path.name + ".partial")
    with naming(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        take_name(partial, path)


def take_name(partial: Path, path: Path) -> None:
    """Give a finished directory its final name, in place of an older one."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)
