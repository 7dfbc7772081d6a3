"""A user's own parts, named in the configuration as ``package.module:Name``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


class PluginError(ValueError):
    """A dotted path that leads to nothing callable; the message says why, the caller knows for what key."""


def is_path(name: str) -> bool:
    """Whether ``name`` is written as a path rather than as the name of a part of ours."""
    return ":" in name


def load(path: str) -> Callable[..., Any]:
    """The class or function at ``package.module:Name``.  Raises :class:`PluginError`."""
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs the user's own code
        raise PluginError(f"{type(error).__name__}: {error}") from error
    if not callable(found):
        raise PluginError(f"{attribute} is not callable")
    return found
