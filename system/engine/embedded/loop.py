"""The decoding thread: runs the scheduler step after step and obeys commands between two of them.

Everything that changes what is generated (a new request, an abort, a pause, new weights) is a command, a
callable that the thread runs at the next token boundary; its caller gets a future.  Nothing is shared, so
nothing is locked.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal

import torch

from system.engine.embedded.job import Event
from system.engine.embedded.scheduler import Emitted, Scheduler
from system.errors import EspalierError

log = logging.getLogger(__name__)

PauseMode = Literal["abort", "retract", "in_place"]

# Sequences have news at different steps.  Waking the sending thread at each step costs decoding more than it
# costs anybody to have the news a few steps later.
HANDOVER_STEPS = 4


class EngineFailed(EspalierError, RuntimeError):
    """The decoding thread died; the message says why."""


class DecodeLoop:
    """Owner of the scheduler and of the thread it runs in."""

    def __init__(
        self, scheduler: Scheduler, deliver: Callable[[list[Emitted]], None], threads: int, nice: int = 0
    ):
        """``nice``: how much the thread yields to others (nice(2)), where all share the processors.

        What is ready to send requests then does so first, and more of them decode together, in fewer steps.
        """
        self._scheduler = scheduler
        self._deliver = deliver
        self._threads, self._nice = threads, nice
        self._commands: deque[tuple[Callable[[Scheduler], Any], Future[Any]]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="decode", daemon=True)
        self._held: list[Emitted] = []  # events not yet handed over
        self.paused = False  # set before the start, it begins in pause
        self.failure = ""
        self._idle_s = {"waiting": 0.0, "paused": 0.0}
        self._wait: tuple[str, float] | None = None  # the wait under way: its cause and when it began
        self._accounts = threading.Lock()  # of the two above

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the thread after its current step.  Raises ``TimeoutError`` when it does not end in time."""
        if self._thread.ident is None:
            return
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the decoding thread did not end within {timeout_s} s")

    def wait(self) -> str:
        """Return once the thread has ended: why it died, or "" if it was stopped."""
        self._thread.join()
        return "" if self.failure == "stopped" else self.failure

    @property
    def idle_s(self) -> dict[str, float]:
        """Seconds by cause, those of the wait under way included.  From any thread."""
        with self._accounts:
            seconds = dict(self._idle_s)
            if self._wait is not None:
                cause, began = self._wait
                seconds[cause] += time.perf_counter() - began
        return seconds

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self.failure

    def call(self, command: Callable[[Scheduler], Any]) -> Future[Any]:
        """Run ``command`` at the next token boundary; events it returns in a list are not delivered (see
        `emit`).
        """
        future: Future[Any] = Future()
        self._commands.append((command, future))
        self._wake.set()
        if not self.alive:
            self._fail_commands()
        return future

    def emit(self, command: Callable[[Scheduler], list[Emitted]]) -> Future[int]:
        """Like :meth:`call` for a command that ends or flushes sequences: its events go to their callers."""

        def run(scheduler: Scheduler) -> int:
            emitted = command(scheduler)
            self._held += emitted
            self._hand_over()
            return len(emitted)

        return self.call(run)

    def pause(self, mode: PauseMode) -> Future[int]:
        """Stop at the next token boundary: ``abort`` ends what runs, ``retract`` drops its KV, ``in_place``
        keeps it.
        """

        def run(scheduler: Scheduler) -> list[Emitted]:
            self.paused = True
            if mode == "abort":
                return scheduler.abort(lambda job: True, "paused with mode abort")
            return scheduler.retract() if mode == "retract" else []

        return self.emit(run)

    def resume(self) -> Future[None]:
        def run(scheduler: Scheduler) -> None:
            self.paused = False

        return self.call(run)

    def _main(self) -> None:
        torch.set_num_threads(self._threads)
        os.nice(self._nice)  # of this thread alone, on Linux
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._turn()
        except Exception as error:
            log.exception("decoding failed")
            self.failure = f"{type(error).__name__}: {error}"
        finally:
            self.failure = self.failure or "stopped"
            self._fail_commands()
            self._fail_jobs()

    def _turn(self) -> None:
        self._wake.clear()
        while self._commands:
            command, future = self._commands.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(command(self._scheduler))
                except Exception as error:
                    future.set_exception(error)
        if self._stopping:
            return
        began = time.perf_counter()
        if self.paused or not self._scheduler.busy:
            self._hand_over()
            cause = "paused" if self.paused else "waiting"
            with self._accounts:
                self._wait = (cause, began)
            self._wake.wait()
            with self._accounts:
                self._idle_s[cause] += time.perf_counter() - began
                self._wait = None
            return
        counters = self._scheduler.counters
        rows, prefill = counters.row_steps, counters.prefill_tokens
        emitted = self._scheduler.step()
        self._held += emitted
        if counters.steps % HANDOVER_STEPS == 0 or not self._scheduler.running:
            self._hand_over()
        counters.timed(
            counters.row_steps - rows, counters.prefill_tokens - prefill, time.perf_counter() - began
        )

    def _hand_over(self) -> None:
        """Give the events gathered since the last time to the threads that wait for them."""
        held, self._held = self._held, []
        if held:
            self._deliver(held)

    def _fail_commands(self) -> None:
        while self._commands:
            try:
                _, future = self._commands.popleft()
            except IndexError:  # the other thread took it
                return
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineFailed(self.failure or "the decoding thread has not been started"))

    def _fail_jobs(self) -> None:
        version = self._scheduler.version
        events = [
            (job, Event([], [], [], [], version, error=f"engine failed: {self.failure}"))
            for job in self._scheduler.jobs()
        ]
        self._held += events
        self._hand_over()
