"""Ray of this machine alone: of its own processes those that somebody here uses."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ray import _raylet
from ray._common.utils import get_default_ray_temp_dir
from ray._private import node, parameter, ray_constants, services

from actors import forked, no_agent
from system.scratch import Scratch

# Ray's settings, by the variables that all its processes read.
SETTINGS = {
    # Workers that wait for a task: by itself one for each core, and one more than a task needs.  Here one
    # task runs at a time (actors/raylet.py), on a worker that stays if the next comes soon.
    "RAY_num_workers_soft_limit": "0",
    "RAY_idle_worker_killing_time_threshold_ms": "10000",
    # The driver need not wait for workers before it asks for some.
    "RAY_prestart_worker_first_driver": "0",
    # What nobody here looks at: a record of each call, kept by Ray's GCS, and measurements for its agent.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
}
_DIRECTORY = 40  # bytes of Ray's directory, below which its sockets have addresses of up to 107
_SHORT = Path("/tmp")
_COMMAND = "_build_python_executable_command_memory_profileable"  # of a Python process of Ray's
_NO_PORT = -1  # what an agent says that serves nothing
_LISTENS_S = 5.0  # for a raylet to listen; after that Ray waits for it, looking every second
_LOOK_S = 0.005


@contextlib.contextmanager
def lean(*, agents: bool = False) -> Generator[None]:
    """Around ``ray.init``, which has no settings for these: no autoscaler, no log monitor, no dashboard
    (``include_dashboard=False`` starts one for usage statistics, and waits for it); and workers that are
    forked, where there is a fork server.  ``agents``: with Ray's own agents (``cluster.ray_agents``).
    """
    settings: dict[str, Any] = {"no_monitor": True, "include_log_monitor": False}
    if forked.SOCKET in os.environ:
        settings["setup_worker_path"] = str(Path(forked.__file__).resolve())
    start_raylet = node.Node.start_raylet

    def start(self: Any, *arguments: Any, **more: Any) -> None:
        start_raylet(self, *arguments, **more)
        until = time.monotonic() + _LISTENS_S
        while not os.path.exists(self.raylet_socket_name) and time.monotonic() < until:
            time.sleep(_LOOK_S)

    with (
        patch.object(parameter, "RayParams", functools.partial(parameter.RayParams, **settings)),
        patch.object(node.Node, "start_api_server", lambda self, **_: None),
        patch.object(node.Node, "start_raylet", start),
        contextlib.nullcontext() if agents else _without_agents(),
    ):
        yield


@contextlib.contextmanager
def _without_agents() -> Generator[None]:
    """Let raylets start :mod:`.no_agent` in the place of their two agents.

    These measure for a dashboard, and prepare environments of workers that are not the driver's
    (``runtime_env``); a raylet starts none of its workers before both have said where they listen, having
    imported Ray.
    """
    compiled: Any = _raylet  # Ray has no types for it
    ports = (
        compiled.METRICS_AGENT_PORT_NAME,
        compiled.METRICS_EXPORT_PORT_NAME,
        compiled.DASHBOARD_AGENT_LISTEN_PORT_NAME,
        compiled.RUNTIME_ENV_AGENT_PORT_NAME,
    )
    agents = (ray_constants.PROCESS_TYPE_DASHBOARD_AGENT, ray_constants.PROCESS_TYPE_RUNTIME_ENV_AGENT)
    command_of, start_raylet = getattr(services, _COMMAND), node.Node.start_raylet

    def command(component: str, *arguments: Any, **more: Any) -> list[str]:
        if component not in agents:
            return command_of(component, *arguments, **more)
        return [sys.executable, "-I", "-S", str(Path(no_agent.__file__).resolve())]

    def start(self: Any, *arguments: Any, **more: Any) -> None:
        for name in ports:
            compiled.persist_port(self._session_dir, self._node_id, name, _NO_PORT)
        start_raylet(self, *arguments, **more)

    with patch.object(services, _COMMAND, command), patch.object(node.Node, "start_raylet", start):
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
        shutil.rmtree(short.path, ignore_errors=True)  # a killed worker may write into it to the last
        short.release()
