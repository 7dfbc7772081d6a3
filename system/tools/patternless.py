"""Validators of JSON schemas that apply no regular expression, and refuse nothing for that.

A regular expression may take for ever and hold the interpreter.  One that is skipped counts as a match; where
a match would be a reason to refuse (``not``), whatever hangs on it is not refused either.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import attrs
from jsonschema.exceptions import ValidationError
from jsonschema.protocols import Validator
from jsonschema.validators import extend

# Of a validator, the keyword's value, what is given, and the schema.
_Keyword = Callable[[Any, Any, Any, Any], Iterator[ValidationError] | None]


class _Skips(threading.local):
    """Keywords of the schema that were skipped so far, although they may not hold.  What was found while
    this grew is not certain.
    """

    count = 0


_skips = _Skips()


@cache
def without_patterns(kind: type[Validator]) -> type[Validator]:
    """``kind`` without its regular expressions.  All errors that it finds are certain.

    It is kept for all subschemas: the library's own ``evolve`` goes back to the stock class, and so to
    regular expressions, at each that has a ``$schema``, as the whole has where ``$ref`` leads to it.
    """
    judges: dict[str, Callable[[_Keyword], _Keyword]] = {
        "pattern": lambda _: _skipped(str),
        "patternProperties": lambda _: _skipped(dict),
        "unevaluatedProperties": lambda _: _skipped(dict),  # the library matches patterns for it, too
        "additionalProperties": _additional,
        "not": _if_certain(lambda error: False),
        "disallow": _if_certain(lambda error: False),
        "unevaluatedItems": _if_certain(lambda error: False),
        "oneOf": _if_certain(lambda error: bool(error.context)),  # none of them holds
        "contains": _if_certain(lambda error: error.validator != "maxContains"),  # too few hold
        "if": lambda _: _if,
    }
    stock: dict[str, Any] = dict(kind.VALIDATORS)
    made: Any = extend(kind, {name: judge(stock[name]) for name, judge in judges.items() if name in stock})
    made.evolve = attrs.evolve
    return made


def _skipped(form: type) -> _Keyword:
    """A keyword of which nothing is known where a ``form`` is given; an empty object satisfies it."""

    def judged(validator: Any, told: Any, given: Any, schema: Any) -> Iterator[ValidationError]:
        _skips.count += isinstance(given, form) and given != {}
        return iter(())

    return judged


def _if_certain(anyway: Callable[[ValidationError], bool]) -> Callable[[_Keyword], _Keyword]:
    """A keyword that may refuse because something else holds; ``anyway``: whether an error is no such one."""

    def of(stock: _Keyword) -> _Keyword:
        def judged(validator: Any, told: Any, given: Any, schema: Any) -> Iterator[ValidationError]:
            before = _skips.count
            errors = [*(stock(validator, told, given, schema) or ())]
            certain = _skips.count == before
            return iter([error for error in errors if certain or anyway(error)])

        return judged

    return of


def _additional(stock: _Keyword) -> _Keyword:
    """Which properties are additional is not known where patterns say it."""

    def judged(validator: Any, told: Any, given: Any, schema: Any) -> Iterator[ValidationError]:
        found = None if "patternProperties" in schema else stock(validator, told, given, schema)
        return iter(found or ())

    return judged


def _if(validator: Any, told: Any, given: Any, schema: Any) -> Iterator[ValidationError]:
    """Where it is not certain whether the condition holds, both ways have to be wrong."""
    before = _skips.count
    holds = validator.evolve(schema=told).is_valid(given)
    ways = ["then" if holds else "else"] if not holds or _skips.count == before else ["then", "else"]
    found = [
        [*validator.descend(given, schema[way], schema_path=way)] if way in schema else [] for way in ways
    ]
    return iter(found[0] if all(found) else ())
