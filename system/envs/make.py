"""The environment that a configuration names."""

from __future__ import annotations

import inspect

from system.config import EnvironmentConfig
from system.envs.plain import PlainEnvironment
from system.envs.protocol import Environment
from system.plugins import ENVIRONMENTS, PluginError


def no_worlds() -> None:
    """``environment=tools``: tools keep no state, so there is no world to act in."""


def make_environment(config: EnvironmentConfig) -> Environment | None:
    """An environment of :class:`.Environment`, or around a plain class (:mod:`system.envs.plain`); None for
    ``tools``.  Raises :class:`PluginError`.
    """
    name, options = config.name, config.options
    kind = ENVIRONMENTS.find(name)
    if kind is no_worlds:
        return None
    if inspect.isclass(kind) and hasattr(kind, "reset") and not hasattr(kind, "open"):
        return PlainEnvironment(name, kind, ENVIRONMENTS.bound(name, options))
    made = ENVIRONMENTS.make(name, options, result_s=config.result_s)
    if not isinstance(made, Environment):
        raise PluginError(
            f"environment.name={name!r}: a class with reset() and public methods is needed, or one derived "
            f"from {Environment.__module__}.{Environment.__name__}, not {type(made).__name__}"
        )
    return made
