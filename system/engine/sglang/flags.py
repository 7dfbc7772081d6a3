"""SGLang's own command-line flags: passed through from ``engine.sglang``, never declared again here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def words(settings: Mapping[str, Any]) -> list[str]:
    """``{"a_b": 1, "on": True, "off": False, "gone": None}`` -> ``["--a-b", "1", "--on"]``.

    A list becomes several words after its flag, a mapping JSON.
    """
    line: list[str] = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        line.append("--" + name.replace("_", "-"))
        if value is True:
            continue
        if isinstance(value, list | tuple):
            line += [str(item) for item in value]
        else:
            line.append(json.dumps(value) if isinstance(value, Mapping) else str(value))
    return line
