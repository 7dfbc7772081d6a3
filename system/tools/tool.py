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
from jsonschema.exceptions import SchemaError, best_match
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from jsonschema_specifications import REGISTRY
from referencing import Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import specification_with

from system.errors import EspalierError
from system.text import named, shown
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec
from system.tools.patternless import without_patterns


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


def argument_error(schema: Mapping[str, Any], arguments: Mapping[str, Any], patterns: bool = True) -> str:
    """What is wrong with ``arguments`` under a JSON schema of type object ("" if nothing), by the draft that
    its ``$schema`` names.  ``patterns``: whether regular expressions in it are applied (:class:`.ToolSpec`);
    without, nothing is wrong that hangs on one, and the schema is somebody else's: whatever it does to the
    validator is told, not raised.
    """
    kind = _dialect(schema)
    try:
        validator = (kind if patterns else without_patterns(kind))(schema, registry=REGISTRY)
        error = best_match(validator.iter_errors(arguments))
    except RecursionError:
        return "the arguments are nested too deeply"
    except Unresolvable as error:
        return f"the tool's schema refers to {shown(error.ref)}, which it does not have"
    except Exception as error:  # $ref can lead to what is no schema, where the validator runs into any kind
        if patterns:
            raise
        return f"the tool's schema cannot be followed: {named(error)[:300]}"
    if error is None:
        return ""
    message = ": ".join([*map(str, error.path), error.message])
    if error.validator == "additionalProperties":
        message += f"; known: {', '.join(error.schema.get('properties', ()))}"
    return message


def schema_problem(schema: Mapping[str, Any]) -> str:
    """What is wrong with a JSON schema that somebody else wrote ("" if nothing)."""
    kind = _dialect(schema)
    try:
        kind.check_schema(dict(schema))  # regular expressions, too
        whole = specification_with(kind.META_SCHEMA["$schema"]).create_resource(schema)
        resolver = REGISTRY.with_resource(base := whole.id() or "", whole).crawl().resolver(base)
        _look_up(whole, resolver)
    except SchemaError as error:
        return ": ".join([*map(str, error.path), error.message[:300]])
    except RecursionError:
        return "it is nested too deeply"
    except Unresolvable as error:
        return f"it refers to {shown(error.ref)}, which it does not have"
    except Exception as error:  # values of odd types and addresses that are none raise many kinds
        return f"it cannot be followed: {named(error)[:300]}"
    return ""


def _dialect(schema: Mapping[str, Any]) -> type[Validator]:
    """Of the draft that ``$schema`` names; of 2020-12 where it names none that is known."""
    known = isinstance(schema.get("$schema", ""), str)
    return validator_for(schema, default=Draft202012Validator) if known else Draft202012Validator


def _look_up(schema: Resource[Any], resolver: Any) -> None:
    """Follow each ``$ref`` of a schema and its subschemas, from where it stands; one within data is none."""
    if isinstance(schema.contents, Mapping) and "$ref" in schema.contents:
        resolver.lookup(schema.contents["$ref"])
    for part in schema.subresources():
        _look_up(part, resolver.in_subresource(part))
