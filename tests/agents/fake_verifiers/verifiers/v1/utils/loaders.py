from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

from verifiers.v1 import Env


def resolve_env_config(block: dict[str, Any]) -> Any:
    if block["taskset"]["id"] == "none":
        raise ModuleNotFoundError("taskset 'none' not found")
    return SimpleNamespace(taskset=SimpleNamespace(task=None, **block["taskset"]))


def load_environment(config: Any) -> Env:
    if config.taskset.id == "slow":
        time.sleep(600)
    if config.taskset.id == "threads":
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    return Env(config)
