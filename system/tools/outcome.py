"""What a tool call comes to, typed, and what the rest of the system needs of a tool service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol


class ToolStatus(StrEnum):
    OK = "ok"
    ERROR = "error"  # the tool ran and failed (an exception in the model's code, say): the model's to mend
    TIMEOUT = "timeout"  # it did not answer before its deadline
    REJECTED = "rejected"  # the call was malformed, or names no known tool
    UNAVAILABLE = "unavailable"  # the tool's server could not be reached, or its circuit is open


@dataclass(frozen=True, slots=True)
class ToolOutcome:
    """The result of one call.  ``text`` is what the model reads, whatever the status."""

    status: ToolStatus
    text: str
    latency_s: float = 0.0
    cached: bool = False
    attempts: int = 1
    detail: str = ""  # for logs; never shown to the model


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as a model sees it."""

    name: str
    description: str
    parameters: dict[str, Any]  # JSON schema of the arguments
    primary: str  # the argument that tag syntax (``<search> … </search>``) fills
    pure: bool = False  # same arguments, same answer: may be cached, de-duplicated, and sent again
    idempotent: bool = False  # the answer may differ, but a call that is sent twice does no more than once
    # Whether regular expressions in `parameters` are applied before the call.  They hold the event loop for
    # as long as they like: those of a server are left to the server.
    patterns: bool = True

    @property
    def repeatable(self) -> bool:
        """Whether a call that may have been delivered may be sent again."""
        return self.pure or self.idempotent


@dataclass(frozen=True, slots=True)
class CallContext:
    """Who calls, and until when."""

    prompt_id: str = ""
    branch: int = 0
    deadline_s: float | None = None  # seconds this call may take at most; the tool's own limit still holds
    again: bool = False  # a run that ended before the answer came may have sent it already


class Tools(Protocol):
    """What a rollout needs of the tool service.  ``call`` never raises for a failing tool."""

    @property
    def specs(self) -> Mapping[str, ToolSpec]: ...

    async def call(self, tool: str, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome: ...
