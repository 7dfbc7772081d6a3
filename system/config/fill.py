"""What a user gives for an entry of a list (a reward, a set of questions), in the form of its dataclass."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from system.errors import ConfigError
from system.plugins import PluginError, nearest, typed

T = TypeVar("T")


def filled(key: str, what: str, start: T, given: Mapping[str, Any], ours: Sequence[str] = ("key",)) -> T:
    """A copy of ``start``, a dataclass, with the fields that are ``given``, as values of their types.

    ``what`` it is, for people; ``ours``: fields that nobody gives.  Raises :class:`ConfigError` with a line
    for each misfit, by its path below ``key``.
    """
    kinds = typing.get_type_hints(type(start))
    fields: Any = start
    known = [one.name for one in dataclasses.fields(fields) if one.name not in ours]
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in given.items():
        if name not in known:
            near = nearest(str(name), known)
            problems.append(f"{key}.{name}: {what} has {', '.join(known)}{near}")
            continue
        try:
            values[name] = _of_kind(f"{key}.{name}", kinds[name], value)
        except PluginError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return typing.cast(T, dataclasses.replace(fields, **values))


def _of_kind(where: str, kind: Any, value: Any) -> Any:
    """Raises PluginError."""
    for outer, wanted, word in ((dict, Mapping, "dictionary"), (list, list, "list")):
        if typing.get_origin(kind) is outer and not isinstance(value, wanted):
            raise PluginError(f"{where}={value!r} must be a {word}")
    if typing.get_args(kind)[1:] == (Any,):  # of a part's own options: it checks them itself
        return dict(value)
    return value if kind is Any else typed(where, kind, value)
