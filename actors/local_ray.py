"""Ray of this machine alone: of its own processes those that somebody here uses."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ray._private import node, parameter

from actors import forked


@contextlib.contextmanager
def lean() -> Generator[None]:
    """Around ``ray.init``, which has no settings for these: no autoscaler, no log monitor, no dashboard
    (``include_dashboard=False`` starts one for usage statistics, and waits for it); and workers that are
    forked, where there is a fork server.
    """
    settings: dict[str, Any] = {"no_monitor": True, "include_log_monitor": False}
    if forked.SOCKET in os.environ:
        settings["setup_worker_path"] = str(Path(forked.__file__).resolve())
    with (
        patch.object(parameter, "RayParams", functools.partial(parameter.RayParams, **settings)),
        patch.object(node.Node, "start_api_server", lambda self, **_: None),
    ):
        yield
