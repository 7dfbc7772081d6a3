"""The parts a configuration names, checked before a run directory or any process is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from system.config.check import names_of
from system.config.schema import Config, PartConfig, settings
from system.errors import ConfigError
from system.plugins import PluginError, Registry


def check_parts(config: Config) -> None:
    """Import every configured part and check its options.  Raises ConfigError with one line per problem."""
    if problems := part_problems(config):
        raise ConfigError("\n".join(problems))


def part_problems(config: Config) -> list[str]:
    """What is wrong with the configured parts, all of it: each with the key and a remedy."""
    problems: list[str] = []
    for registry, name, options in parts(config):
        try:
            registry.check(name, options)
        except PluginError as error:
            problems.append(str(error))
    for name in config.tools.options:
        if name not in config.tools.names:
            names = ", ".join(config.tools.names)
            problems.append(f"tools.options.{name}: no such tool in tools.names ({names}): correct either")
    return problems


def parts(config: Config) -> Iterator[tuple[Registry, str, Mapping[str, Any]]]:
    """(registry, name, options) of every part."""
    for one in settings().values():
        if (registry := one.rule.registry) is not None:
            value = one.of(config)
            section = getattr(config, one.section)
            for name in names_of(value):
                options = value.options if isinstance(value, PartConfig) else section.options
                yield registry, name, options.get(name, {}) if isinstance(value, list) else options
