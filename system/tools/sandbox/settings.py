"""What the sandbox's parent tells its fork server, once, at start: plain data, sent as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the fork server imports nothing but the standard library
    from system.config import ToolsConfig

SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo")
PROGRAMS = (
    *("/usr/bin", "/bin", "/usr/local/bin", "/usr/local/lib", "/usr/libexec", "/usr/share", "/usr/include"),
    "/etc/alternatives",
)
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/urandom")


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """Limits of one call."""

    wall_s: float = 10.0
    cpu_s: float = 5.0  # whole seconds, rounded up
    memory_mb: int = 256  # address space beyond the idle interpreter's (which includes what is preloaded)
    output_chars: int = 2000  # of each of stdout and stderr
    file_mb: int = 16  # largest file
    disk_mb: int = 64  # all files together
    open_files: int = 64
    threads: int = 16  # a call is one process
    branches: int = 48  # most sessions of a tree at once

    @property
    def files(self) -> int:
        """Most files and directories together: one for each block of the disk."""
        return max(64, (self.disk_mb << 20) >> 12)

    @classmethod
    def from_config(cls, tools: ToolsConfig) -> SandboxLimits:
        return cls(
            wall_s=tools.python_wall_s,
            cpu_s=tools.python_cpu_s,
            memory_mb=tools.python_memory_mb,
            output_chars=tools.python_output_chars,
        )


@dataclass(frozen=True)
class Shell:
    """What commands may use beside the system's own programs."""

    readable: Sequence[str] = ()  # directories; programs in their "bin" are found
    given: str = ""  # a directory of directories, one of which a session may begin with a copy of


@dataclass(frozen=True)
class Settings:
    """Where and how programs run; the same for every call."""

    base: str  # an empty directory of ours: scratch directories, or the mount point of the cell's root
    namespaces: bool  # build a cell of namespaces; otherwise confine with Landlock and seccomp alone
    limits: SandboxLimits
    paths: Sequence[str] = ()  # directories for sys.path, readable inside
    modules: Mapping[str, str] = field(default_factory=dict[str, str])  # installed ones by name: their places
    readable: Sequence[str] = ()  # what these modules consist of: directories and files
    preload: Sequence[str] = ()  # modules imported once, before any call
    shell: Shell | None = None  # what commands may use, where these are run

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        values = json.loads(text)
        shell = values["shell"] and Shell(**values["shell"])
        return cls(**values | {"limits": SandboxLimits(**values["limits"]), "shell": shell})


def readable_directories(settings: Settings) -> list[str]:
    """Directories a program may read: shared libraries and Python's own library, in the names sys.path
    uses."""
    library = os.path.join(sys.base_prefix, "lib")
    candidates = [*SYSTEM_LIBRARIES, library, *sys.path, *settings.paths, *settings.readable]
    if settings.shell is not None:
        candidates += [*PROGRAMS, os.path.join(sys.base_prefix, "bin"), *settings.shell.readable]
    kept: list[str] = []
    for path in candidates:
        inside = any(path == other or path.startswith(other + "/") for other in kept)
        if os.path.isdir(path) and not inside:
            kept.append(path)
    return kept


def readable_files(settings: Settings) -> list[str]:
    """Single files a program may read, beside those directories."""
    return [*SYSTEM_FILES, *(path for path in settings.readable if os.path.isfile(path))]
