"""What the sandbox's parent tells its fork server, once, at start: plain data, sent as JSON."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, replace

SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


@dataclass(frozen=True)
class Settings:
    """Limits are per call; sizes in bytes unless the name says otherwise."""

    base: str  # an empty directory of ours: scratch directories, or the mount point of the cell's root
    namespaces: bool  # build a cell of namespaces; otherwise confine with Landlock and seccomp alone
    cpu_s: float
    memory: int  # address space beyond what the idle interpreter maps
    file_size: int  # largest file
    disk: int  # all files in the scratch directory (only a namespace cell can enforce it)
    open_files: int
    threads: int
    output: int  # bytes kept of each of stdout and stderr
    paths: tuple[str, ...] = ()  # directories for sys.path, readable inside
    preload: tuple[str, ...] = ()  # modules imported once, before any call

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        settings = cls(**json.loads(text))
        return replace(settings, paths=tuple(settings.paths), preload=tuple(settings.preload))


def readable_directories(settings: Settings) -> list[str]:
    """Directories a program may read: shared libraries and Python's own library, in the names sys.path
    uses."""
    library = os.path.join(sys.base_prefix, "lib")
    candidates = [*SYSTEM_LIBRARIES, library, *sys.path, *settings.paths]
    kept: list[str] = []
    for path in candidates:
        inside = any(path == other or path.startswith(other + "/") for other in kept)
        if os.path.isdir(path) and not inside:
            kept.append(path)
    return kept
