"""Reading the values of a ``config.json``: numbers as they should be, or a refusal by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from system.config import ConfigError


class UnsupportedModel(ConfigError):
    """The model asks for something that is not computed here; the message names the file and the thing."""


def whole(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number above 0.  Raises KeyError where there is neither one nor a default."""
    value = config[name] if default is None else config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(f"{name} {value!r}; it is a whole number above 0")
    return value


def number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A number above 0.  Raises KeyError where there is neither one nor a default."""
    value: Any = config[name] if default is None else config.get(name)
    value = default if value is None else value
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    if not sound or not 0 < value < math.inf:
        raise UnsupportedModel(f"{name} {value!r}; it is a number above 0")
    return float(value)
