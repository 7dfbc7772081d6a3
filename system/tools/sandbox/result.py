"""What became of a program that ran in the sandbox."""

from __future__ import annotations

from dataclasses import dataclass

from system.tools.outcome import ToolStatus


@dataclass(frozen=True, slots=True)
class SandboxResult:
    """OK: the program ran to its end; ERROR: it failed; TIMEOUT: it ran out of time."""

    status: ToolStatus
    stdout: str
    stderr: str
    exit_code: int  # negative: killed by that signal
    reason: str = ""  # why it did not end well, one line
    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_rss_mb: float = 0.0
    truncated: bool = False

    @property
    def text(self) -> str:
        """What the model reads: its output, then what went wrong."""
        parts = [self.stdout.rstrip("\n"), self.stderr.rstrip("\n"), self.reason]
        return "\n".join(part for part in parts if part)
