from __future__ import annotations

from typing import Any


def agent_config_fields(config: Any) -> dict[str, Any]:
    return {}
