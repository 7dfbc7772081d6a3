"""Learner ranks for tests: two long-lived processes that run test functions, so that imports are paid once.

``Ranks.run(function, world=2, **kwargs)`` calls ``function(Place, **kwargs)`` in each rank and returns the results
in rank order.  Functions must be module-level (they travel by name) and their arguments small.
"""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

DEADLINE_S = 120.0


@dataclass(frozen=True)
class Place:
    rank: int
    world: int
    init_method: str


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while (job := connection.recv()) is not None:
        function, place, kwargs = job
        try:
            connection.send((True, function(place, **kwargs)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


class Ranks:
    def __init__(self, size: int = 2) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *, world: int = 2, **kwargs: Any) -> list[Any]:
        init_method = f"tcp://127.0.0.1:{free_port()}"
        for rank in range(world):
            self._pipes[rank].send((function, Place(rank, world, init_method), kwargs))
        outcomes = []
        for rank in range(world):
            assert self._pipes[rank].poll(DEADLINE_S), f"rank {rank} did not answer within {DEADLINE_S} s"
            outcomes.append(self._pipes[rank].recv())
        failures = [f"rank {r}:\n{result}" for r, (ok, result) in enumerate(outcomes) if not ok]
        assert not failures, "\n".join(failures)
        return [result for _, result in outcomes]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
