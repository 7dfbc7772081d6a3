"""What a tool is to the service: one class with a spec, a run and a check.

To bring your own, write such a class and name it in the configuration as ``package.module:Class`` (it is made
without arguments)::

    class Clock:
        spec = ToolSpec("clock", "Tells the time.", {"type": "object", "properties": {}}, primary="")

        async def run(self, arguments, context):
            return ToolOutcome(ToolStatus.OK, datetime.now().isoformat())

        async def check(self):
            return None

Deadlines, retries, limits, caching and metrics are the service's (:mod:`.service`); a tool only does its
work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from system.errors import EspalierError
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec


class ToolUnavailable(EspalierError):
    """The tool cannot be reached or does not work now.

    ``retryable``: another attempt may succeed soon; ``delivered``: the tool may have got the call, and acted
    on it, so that only a repeatable one (:attr:`.ToolSpec.repeatable`) is sent again.
    """

    def __init__(self, reason: str, *, retryable: bool = True, delivered: bool = True):
        super().__init__(reason)
        self.retryable, self.delivered = retryable, delivered


class CallRefused(EspalierError):
    """The tool works, but not with these arguments; the message is for the model."""


@runtime_checkable
class Tool(Protocol):
    """One tool.  An instance serves many calls at once; ``run`` is cancelled at the call's deadline,
    and left behind if it goes on all the same."""

    @property
    def spec(self) -> ToolSpec: ...

    async def run(self, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        """Do the call.  ``arguments`` satisfy the spec.  Failures of the call itself are outcomes; raises
        :class:`ToolUnavailable` when the tool does not work and :class:`CallRefused` when it does not take
        the call; any other exception becomes an ERROR outcome."""
        ...

    async def check(self) -> None:
        """Raise :class:`ToolUnavailable`, with a reason and a remedy, if calls cannot work."""
        ...


def argument_error(schema: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    """What is wrong with ``arguments`` under a JSON schema of type object ("" if nothing)."""
    error = best_match(Draft202012Validator(schema).iter_errors(arguments))
    if error is None:
        return ""
    message = ": ".join([*map(str, error.path), error.message])
    if error.validator == "additionalProperties":
        message += f"; known: {', '.join(error.schema.get('properties', ()))}"
    return message
