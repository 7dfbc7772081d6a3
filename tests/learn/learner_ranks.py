"""Learner ranks for tests: long-lived processes that run test functions, so that imports are paid once.

``Ranks.run(function, world=2, **kwargs)`` calls ``function(Place, **kwargs)`` in each rank and returns the
results in rank order.  Functions must be module-level (they travel by name) and their arguments small.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

DEADLINE_S = 150.0


@dataclass(frozen=True)
class Place:
    rank: int
    world: int
    init_method: str


def _serve(connection: Connection) -> None:
    import gc

    import torch

    from system.learn import cpu

    with cpu.quick_import():
        importlib.import_module("system.learn.trainer")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # host names need not resolve
    torch.set_num_threads(1)
    gc.freeze()  # what has been imported stays, and takes a fifth of a second to look through after each job
    while (job := connection.recv()) is not None:
        function, place, kwargs = job
        try:
            connection.send((True, function(place, **kwargs)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
        # A trainer stands in reference circles, and its process groups keep polling threads: hundreds of them
        # would take the machine from the tests that follow.
        gc.collect()


class Ranks:
    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder, self._meetings = tempfile.TemporaryDirectory(), 0

    def _start(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        for _ in range(len(self._processes), size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(
        self, function: Callable[..., Any], *, world: int = 2, deadline_s: float = DEADLINE_S, **kwargs: Any
    ) -> list[Any]:
        self._start(world)
        self._meetings += 1  # a file, not a port that another process may take in the meantime
        init_method = f"file://{self._folder.name}/{self._meetings}"
        for rank in range(world):
            self._pipes[rank].send((function, Place(rank, world, init_method), kwargs))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + deadline_s
        while len(results) < world:
            ready = wait(self._pipes[:world], timeout=max(0.0, deadline - time.monotonic()))
            failure = "" if ready else f"no answer within {deadline_s} s; only from ranks {sorted(results)}"
            for pipe in ready:
                rank = self._pipes.index(pipe)  # pyright: ignore[reportArgumentType]
                ok, result = self._pipes[rank].recv()
                results[rank] = result
                failure = failure if ok else f"rank {rank}:\n{result}"
            if failure:
                self.close()  # the other rank may wait in a collective: start afresh with the next test
                raise AssertionError(failure)
        return [results[rank] for rank in range(world)]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join(timeout=10)
        self._processes, self._pipes = [], []
