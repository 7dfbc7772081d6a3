"""A value against the rule of its setting."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from system.config.rule import PartConfig
from system.config.settings import Setting
from system.plugins import PluginError, nearest

MAY_BE_EMPTY = ("reward.name", "agent.run")  # see reward_problems, AgentConfig.on


def broken_rules(one: Setting, value: Any) -> Iterator[str]:
    """What ``value`` breaks of the setting's own rule."""
    key, rule = one.key, one.rule
    if isinstance(value, list | dict) and typing.get_args(one.kind)[-1] is str:
        items: Iterable[Any] = value.values() if isinstance(value, dict) else value
        if wrong := [item for item in items if not isinstance(item, str)]:
            yield f"{key}: {wrong[0]!r} must be a text: {rule.text}"
            return
    if isinstance(value, str) and "\0" in value:
        yield f"{key}={value!r} has a NUL character in it: no path and no name can"
    if rule.path and isinstance(value, str) and value.startswith("~"):
        yield f"{key}={value}: `~` stands for nothing here: write the whole path, or ${{oc.env:HOME}}"
    if rule.registry is not None:
        for name in [] if key in MAY_BE_EMPTY and not value else names_of(value):
            try:
                rule.registry.check_name(name)
            except PluginError as error:
                yield str(error)
    if rule.choices and value not in rule.choices:
        close = nearest(str(value), rule.choices)
        yield f"{key}={value!r}: choose one of {', '.join(rule.choices)}{close}"
    if isinstance(value, int | float):
        low = -math.inf if rule.least is None else rule.least
        high = math.inf if rule.most is None else rule.most
        if not math.isfinite(value):
            yield f"{key}={value} must be a finite number: {rule.text}"
        elif not low <= value <= high or (rule.above is not None and value <= rule.above):
            yield f"{key}={value} must be {rule.bounds}: {rule.text}"


def names_of(value: Any) -> list[str]:
    """The names of parts that a setting with a registry holds."""
    if isinstance(value, PartConfig):
        return [value.name]
    return [value] if isinstance(value, str) else value
