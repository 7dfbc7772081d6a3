from __future__ import annotations

import importlib
import multiprocessing
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from verifiers.v1 import Env, Panic


def resolve_env_config(block: dict[str, Any]) -> Any:
    if block["taskset"]["id"] == "none":
        raise ModuleNotFoundError("taskset 'none' not found")
    return SimpleNamespace(taskset=SimpleNamespace(task=None, **block["taskset"]))


def load_environment(config: Any) -> Env:
    match config.taskset.id:
        case "slow":
            time.sleep(600)
        case "panics":
            raise Panic("at src/lib.rs:7")
        case "numpy":
            importlib.import_module("numpy.random")
        case "starts":  # and leaves a process that holds all that it can
            multiprocessing.get_context("fork").Process(target=time.sleep, args=(600.125,)).start()
            Path(os.environ["STARTED"]).write_text(str(multiprocessing.active_children()[0].pid))
        case _:
            pass
    if config.taskset.id == "threads":
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    return Env(config)
