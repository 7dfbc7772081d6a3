"""Where metric records go: the recorder writes flat records, and a sink keeps or sends them.

``metrics.jsonl`` is a run's results: failing to write it is an error of the run.  Everything else is a *view*
of it (:mod:`system.observe.views`), whose failures are told once and never stop a run.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from system.observe.jsonl import JsonlWriter, read_jsonl
from system.observe.rundir import RunDir
from system.observe.spans import PhaseSpan
from system.observe.terminal import shown

RESUMED = "resumed_from"  # a record {RESUMED: step}: the run went back to its checkpoint after this step
START_S = 120.0  # for a view to start, at the end of a run; W&B's own deadlines are shorter


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something goes wrong (:mod:`system.observe.alarms`) from a step on or, unless ``on``, up to it."""

    step: int
    time: float  # seconds since 1970
    name: str
    on: bool
    text: str


class Sink(Protocol):
    """What the recorder gives its records to; :class:`RunFiles` and :class:`GuardedView` are two."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one flat record; it has an integer ``step``, or is the mark of a resume."""
        ...

    def alarm(self, alarm: Alarm) -> None:
        """An alarm begins, or ends."""
        ...

    def span(self, span: PhaseSpan) -> None:
        """A phase is over."""
        ...

    def close(self) -> None:
        """Everything taken so far is kept, or sent, when this returns."""
        ...


class RunFiles:
    """``metrics.jsonl`` and ``alarms.jsonl``, which are a run's results: failing to write them ends it."""

    def __init__(self, run_dir: RunDir) -> None:
        self._path = run_dir.alarms_path
        self._metrics, self._alarms = JsonlWriter(run_dir.metrics_path), JsonlWriter(self._path)

    def write(self, record: Mapping[str, Any]) -> None:
        self._metrics.write(record)
        if RESUMED not in record:
            return
        self._alarms.write(record)
        for name in raised(self._path):  # of an earlier session; this one looks anew
            self.alarm(Alarm(record[RESUMED], record["time"], name, False, ""))

    def alarm(self, alarm: Alarm) -> None:
        self._alarms.write(asdict(alarm))

    def span(self, span: PhaseSpan) -> None:
        """Nothing: what phases took is in the records."""

    def close(self) -> None:
        self._metrics.close()
        self._alarms.close()


class MetricsView:
    """A view of ``metrics.jsonl`` elsewhere.  A subclass raises whatever goes wrong: its guard tells it."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Show one record: its numbers (NaN where nothing is known) under their keys, at its ``step``."""
        raise NotImplementedError

    def rewind(self, step: int) -> None:
        """The run went back to its checkpoint after ``step``; records past it come again, or those of them
        that are new (:class:`GuardedView`).
        """

    def alarm(self, alarm: Alarm) -> None:
        """Show that an alarm begins; that it ends, no view is told."""

    def span(self, span: PhaseSpan) -> None:
        """Show that a phase is over."""

    def close(self) -> None:
        """Keep, or send, what is not yet."""


class GuardedView:
    """A view behind which nothing can stop a run: what it raises is told once, and then it is left alone.

    A resumed run does steps again.  A view that cannot take back what it was sent gets each of a step's
    records once: those that ``sent`` (an earlier session's ``metrics.jsonl``) has already are left out.
    """

    def __init__(
        self,
        name: str,
        off: str,
        make: Callable[[], MetricsView],
        sent: Path | None,
        *,
        aside: bool = False,
        start_s: float = START_S,
    ) -> None:
        """``off``: the override that does without it.  ``sent`` None: the view takes back what it was sent,
        and gets all records.  ``aside``: it starts in a thread, and what comes meanwhile waits for it; at the
        end of a run it is waited for until ``start_s`` seconds after its start.
        """
        self._name, self._off = name, off
        self._view: MetricsView | None = None
        # Now: soon this session's are there, too.
        self._sent = None if sent is None else {_which(one) for one in read_jsonl(sent)}
        self._lock = threading.Lock()  # of the next two
        self._waiting: list[tuple[str, Callable[[MetricsView], None]]] = []
        self._started = False  # or given up
        self._starting: threading.Thread | None = None
        self._start_s, self._start_until = start_s, time.monotonic() + start_s
        if aside:
            start = threading.Thread(target=self._start, args=(make,), name=f"start {name}", daemon=True)
            self._starting = start
            start.start()
        else:
            self._start(make)

    def _start(self, make: Callable[[], MetricsView]) -> None:
        view, failure = None, None
        try:
            view = make()
        except (Exception, SystemExit) as error:  # W&B ends so without a login in some versions
            failure = error
        with self._lock:
            late, self._started = self._started, True
            if not late:
                self._view = view
                if failure is not None:
                    self._give_up("did not start", failure)
                for failed, call in self._waiting:
                    self._call(failed, call)
                self._waiting.clear()
        if late and view is not None:
            _let_go(view)

    def ready(self) -> bool:
        """Whether it is there, once it has started, or should have."""
        if self._starting is not None:
            self._starting.join(max(0.0, self._start_until - time.monotonic()))
        with self._lock:
            if not self._started:
                self._started = True
                self._waiting.clear()
                self._tell("did not start", TimeoutError(f"not within {self._start_s:g} s"))
        return self._view is not None

    def write(self, record: Mapping[str, Any]) -> None:
        if RESUMED in record:
            self._guarded("did not go back", lambda view: view.rewind(record[RESUMED]))
        else:
            self._guarded("stopped taking metrics", lambda view: self._write(view, record))

    def _write(self, view: MetricsView, record: Mapping[str, Any]) -> None:
        if self._sent is not None:
            which = _which(record)
            if which in self._sent:
                return
            self._sent.add(which)
        view.write(record)

    def alarm(self, alarm: Alarm) -> None:
        if alarm.on:
            self._guarded("stopped taking alarms", lambda view: view.alarm(alarm))

    def span(self, span: PhaseSpan) -> None:
        self._guarded("stopped taking spans", lambda view: view.span(span))

    def close(self) -> None:
        self.ready()
        view, self._view = self._view, None
        if view is not None:
            try:
                view.close()
            except (Exception, SystemExit) as error:
                self._tell("did not finish", error)

    def _guarded(self, failed: str, call: Callable[[MetricsView], None]) -> None:
        with self._lock:
            if self._started:
                self._call(failed, call)
            else:
                self._waiting.append((failed, call))

    def _call(self, failed: str, call: Callable[[MetricsView], None]) -> None:
        if self._view is not None:
            try:
                call(self._view)
            except (Exception, SystemExit) as error:
                self._give_up(failed, error)

    def _give_up(self, failed: str, error: BaseException) -> None:
        view, self._view = self._view, None
        self._tell(failed, error)
        if view is not None:  # it may hold a port, a thread or a process, and take its time to let go of them
            threading.Thread(target=_let_go, args=(view,), name=f"end {self._name}", daemon=True).start()

    def _tell(self, failed: str, error: BaseException) -> None:
        reason = shown(str(error)).strip() or type(error).__name__
        print(
            f"WARNING: {self._name} {failed}: {reason}\n"
            "         The run goes on; its metrics are in metrics.jsonl. "
            f"Set {self._off} to do without {self._name}.",
            file=sys.stderr,
            flush=True,
        )


def _let_go(view: MetricsView) -> None:
    """Close a view that has failed, which was told."""
    with contextlib.suppress(Exception, SystemExit):
        view.close()


def _which(record: Mapping[str, Any]) -> tuple[int, str]:
    """Which of a step's records this is: that of training, of an evaluation, or of a held-out loss."""
    kind = str(record.get("eval/which") or "sft/held_out_loss" * ("sft/held_out_loss" in record))
    return record.get("step", -1), kind


def numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What a view shows of a record: its numbers, without ``step`` and ``time``."""
    for key, value in record.items():
        if key not in ("step", "time") and isinstance(value, int | float):
            yield key, float(value)


def identity(directory: Path) -> str:
    """A random name of this run, kept in ``directory`` so that a resumed session goes on under it."""
    path = directory / "id"
    if not path.is_file():
        directory.mkdir(exist_ok=True)
        path.write_text(secrets.token_hex(6), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def history(path: str | Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``, or ``alarms.jsonl``, that count: a resume takes back those past its
    checkpoint.
    """
    records: list[dict[str, Any]] = []
    for record in read_jsonl(path):
        if RESUMED in record:
            records = [one for one in records if one["step"] <= record[RESUMED]]
        else:
            records.append(record)
    return records


def raised(path: Path) -> dict[str, str]:
    """The alarms that are on by ``alarms.jsonl``: name -> text."""
    on: dict[str, str] = {}
    for one in history(path):
        on.pop(one["name"], None)
        if one["on"]:
            on[one["name"]] = one["text"]
    return on


def series(records: list[dict[str, Any]], key: str) -> Iterator[tuple[int, float]]:
    """(step, value) of every record that has a number under ``key``."""
    for record in records:
        value = record.get(key)
        if isinstance(value, int | float):
            yield int(record["step"]), float(value)
