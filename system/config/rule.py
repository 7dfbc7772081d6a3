"""What a setting says of itself: its text, its bounds, its choices."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from system.plugins import Registry


@dataclass
class PartConfig:
    """A part picked by name (:mod:`system.plugins`); a bare word for the setting is its name."""

    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """What a setting is, and which values it takes; every number has to be finite as well."""

    text: str
    least: float | None = None  # the smallest value allowed
    above: float | None = None  # smaller or equal values are refused
    most: float | None = None
    choices: tuple[str, ...] = ()
    registry: Registry | None = None  # or a name of this registry, or one's own as package.module:Name
    path: bool = False  # of a file or directory
    safe_on_resume: bool = False  # a resumed run may change it without becoming a different experiment

    @property
    def bounds(self) -> str:
        """``1 or more``, ``above 0``, ``in (0, 1]``; empty where there are none."""
        if self.most is not None:
            low = f"({self.above:g}" if self.least is None else f"[{self.least:g}"
            return f"in {low}, {self.most:g}]"
        if self.above is not None:
            return f"above {self.above:g}"
        return "" if self.least is None else f"{self.least:g} or more"


def setting(default: Any, text: str, **rule: Any) -> Any:
    """A field of a section: its default, what it is, and keywords of :class:`Rule`."""
    metadata = {"rule": Rule(text, **rule)}
    if isinstance(default, str | int | float):
        return field(default=default, metadata=metadata)
    return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
