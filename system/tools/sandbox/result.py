"""What became of a program that ran in the sandbox."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any, Self

from system.tools.outcome import ToolStatus
from system.tools.sandbox.settings import SandboxLimits


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

    @classmethod
    def of(cls, reply: dict[str, Any], limits: SandboxLimits, wall_s: float) -> Self:
        """A warden's ``reply`` to a program that had ``wall_s`` seconds."""
        limit, code = limits.output_chars, reply["exit_code"]
        stdout, cut_out = _shortened(reply["stdout"], reply["stdout_bytes"], limit, head=True)
        stderr, cut_err = _shortened(reply["stderr"], reply["stderr_bytes"], limit, head=False)
        status, reason = ToolStatus.OK if code == 0 else ToolStatus.ERROR, ""
        if reply["excess"]:
            status, reason = ToolStatus.ERROR, f"Stopped: {reply['excess']}."
        elif reply["timed_out"]:
            status, reason = ToolStatus.TIMEOUT, f"Stopped: the program ran longer than {wall_s:g} s."
        elif code == -signal.SIGKILL and reply["cpu_s"] >= limits.cpu_s - 0.5:
            status = ToolStatus.TIMEOUT
            reason = f"Stopped: the program used more than {limits.cpu_s:g} s of CPU time."
        elif reply.get("ended"):  # a session's process, not the cell alone
            reason = "The program ended its interpreter."
        elif code < 0:
            reason = f"The program was killed by {signal.Signals(-code).name}."
        elif code > 0 and not stderr:
            reason = f"The program exited with code {code}."
        return cls(
            status=status,
            stdout=stdout,
            stderr=stderr,
            exit_code=code,
            reason=reason,
            wall_s=reply["wall_s"],
            cpu_s=reply["cpu_s"],
            peak_rss_mb=reply["peak_rss_mb"],
            truncated=cut_out or cut_err,
        )


def _shortened(text: str, total_bytes: int, limit: int, *, head: bool) -> tuple[str, bool]:
    """At most the first (``head``) or last ``limit`` characters, with a note of what is missing; whether it
    is."""
    if len(text) <= limit and total_bytes <= len(text.encode()):
        return text, False
    note = f"[output cut: {total_bytes} bytes in all]"
    return f"{text[:limit]}\n… {note}" if head else f"{note} …\n{text[-limit:]}", True
