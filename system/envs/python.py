"""``environment=python``: an interpreter that keeps its variables, imports and files from call to call.

One interpreter per live branch, in the sandbox, forked by the operating system where the branch forks
(:mod:`system.tools.sandbox.sessions`).  What cannot be copied so is done again from the journal: an open
file, a second thread, memory that is shared.
"""

from __future__ import annotations

import re
from dataclasses import replace

from system.config import ToolsConfig
from system.envs.sessions import SessionEnvironment
from system.tools.http_tools import PythonTool
from system.tools.sandbox.sandbox import Sandbox, SandboxLimits

_USUAL = SandboxLimits()
# The place of a session's directory, and of an object in memory, are never the same twice.
_OF_THE_MOMENT = re.compile(r"(?<=/scratch/)[0-9a-f]{16}\b|\b0x[0-9a-f]{6,}\b")


class PythonEnvironment(SessionEnvironment):
    """Interpreters."""

    spec = replace(
        PythonTool.spec,
        description="Run Python code and get what it prints and the value of its last expression. "
        "Variables, imports and files are there in the next call.",
        idempotent=False,
    )
    remedy = ": environment=tools with tools.names=[python] keeps no state, and needs no namespaces"
    trial = ("6 * 7", "42")

    def __init__(
        self,
        wall_s: float = _USUAL.wall_s,
        cpu_s: float = _USUAL.cpu_s,
        memory_mb: int = _USUAL.memory_mb,
        output_chars: int = _USUAL.output_chars,
        packages: list[str] | None = None,
        concurrency: int = 16,
        live_sessions: int = 2000,
        live_mb: int = 8192,
    ) -> None:
        """``wall_s``, ``cpu_s``, ``output_chars``: of one call; ``memory_mb``: of one session; ``packages``:
        installed ones that may be imported (None: ``tools.python_packages`` as they come); ``concurrency``:
        calls that run at once; ``live_sessions``, ``live_mb``: beyond so many sessions, or so much memory of
        their states, the one which was idle longest is given up, and built again when its branch goes on.
        """
        limits = SandboxLimits(wall_s, cpu_s, memory_mb, output_chars)
        offered = ToolsConfig().python_packages if packages is None else packages
        sandbox = Sandbox(limits, concurrency=concurrency, packages=offered, namespaces=True)
        super().__init__(sandbox, live_sessions, live_mb, wall_s)

    def normalise(self, text: str) -> str:
        return _OF_THE_MOMENT.sub("…", text)
