"""Ray of this machine alone: of its own processes those that somebody here uses."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ray._common.utils import get_default_ray_temp_dir
from ray._private import node, parameter

from actors import forked
from system.scratch import Scratch

_DIRECTORY = 40  # bytes of Ray's directory, below which its sockets have addresses of up to 107
_SHORT = Path("/tmp")


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


@contextlib.contextmanager
def directory() -> Generator[dict[str, str]]:
    """Variables that give Ray a directory for the length of the block, where the path of its own
    (``$TMPDIR/ray``) is too long for sockets.
    """
    if len(os.fsencode(get_default_ray_temp_dir())) <= _DIRECTORY:
        yield {}
        return
    short = Scratch.make("ray", _SHORT)
    try:
        yield {"RAY_TMPDIR": str(short.path)}
    finally:
        shutil.rmtree(short.path, ignore_errors=True)  # Ray's agents may write into it to the last
        short.release()
