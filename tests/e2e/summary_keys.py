"""Which keys of a ``summary.json`` the table in ``docs/summary.md`` explains."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parents[2] / "docs" / "summary.md"
EMPTY = ""
Way = tuple[str, ...]


def explained() -> list[str]:
    """The keys in the table's first column, as they are written there."""
    rows = [
        line.split(" | ")[0] for line in TABLE.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"
    ]
    return [key for row in rows for key in re.findall(r"`([^`]+)`", row)]


def matches(key: str, path: Way) -> bool:
    """``<name>`` in a key of the table is any text; an empty group needs a key that begins with it."""
    parts = [re.sub(r"<\w+>", ".+", re.escape(part)) for part in key.split(" > ")]
    if path[-1] == EMPTY:
        path = path[:-1]
        parts = parts[: len(path)]
    return len(parts) == len(path) and all(map(re.fullmatch, parts, path))


def paths(values: Mapping[str, Any], above: Way = ()) -> Iterator[Way]:
    """The way to every value, and to every empty group; settings are explained elsewhere."""
    for name, value in values.items():
        at = (*above, name)
        if not isinstance(value, Mapping) or at == ("config",):
            yield at
        elif value:
            yield from paths(value, at)
        else:
            yield (*at, EMPTY)


def unexplained(summary: Mapping[str, Any]) -> list[Way]:
    return [path for path in paths(summary) if not any(matches(key, path) for key in explained())]


def superfluous(summary: Mapping[str, Any]) -> list[str]:
    """Keys of the table that nothing in ``summary`` has."""
    return [key for key in explained() if not any(matches(key, path) for path in paths(summary))]
