"""Ray's daemon on this machine, without which Ray ends a process that touches a large object.

It does so on the spot (``_exit(1)``), with nothing said or saved, and learns of the daemon's end only after
ten seconds.  So we look ourselves, and leave large objects to other processes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, cast

import psutil
import ray
from ray._private.worker import global_worker
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.ray_support import NodeLost


def check() -> None:
    """Raises NodeLost if the daemon that this process is joined to has ended."""
    node = global_worker.node
    if node is not None and (daemon := _found(node.raylet_socket_name)) is not None and ended(daemon):
        raise NodeLost("Ray's daemon on this machine (raylet) has ended")


def beside(function: Callable[..., Any], *arguments: Any, alone: bool = False) -> Any:
    """Start ``function(*arguments)`` in another process of this machine; returns a reference to its value.

    For what handles large objects: once its actors run, the driver itself touches none.  ``alone``: the
    process ends with it, since it has imported what nobody else there needs.
    """
    check()
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    task = _task(function, 1 if alone else 0)
    return task.options(num_cpus=0, max_retries=0, scheduling_strategy=here).remote(*arguments)


@functools.cache
def _task(function: Callable[..., Any], max_calls: int) -> Any:
    """Ray's task of a function of a module: for each that it is given anew, Ray keeps a copy in every process
    that has to do with it, and looks for a worker anew.  ``max_calls``: of a process; 0: any number.
    """
    return cast(Any, ray.remote)(max_calls=max_calls)(function)


def ended(process: psutil.Process) -> bool:
    """Whether it is gone, or a zombie that nobody has waited for."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@functools.cache
def _found(socket: str) -> psutil.Process | None:
    """The raylet that serves ``socket``; None where it cannot be seen, from inside a container perhaps."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name() == "raylet" and f"--raylet_socket_name={socket}" in process.cmdline():
                return process
    return None
