"""Live progress: a small panel on a terminal, one plain line every few seconds anywhere else."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from system.observe.recorder import Status
from system.observe.terminal import shown, visible
from system.redact import redact

TRAINING = "training"
_FRAME_S = 0.25  # redraw interval on a terminal
_UNKNOWN = "–"
_FOLLOWED = ("reward", "accuracy", "staleness", "forks/tree", "gen tok/s")


class Progress:
    """Shows a run's status until closed.

    ``source`` is asked for a :class:`Status` whenever something is drawn.  Use it as a context manager and
    let ``run`` be a task of the conductor::

        with Progress(recorder.status, total_steps=100, interval_s=2.0) as progress:
            progress.phase("warm start", total=300)
            progress.advance(1, "loss 1.23")
            progress.phase("training")
            progress.note("eval before: accuracy 0.43")
    """

    def __init__(
        self,
        source: Callable[[], Status],
        *,
        total_steps: int,
        interval_s: float,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        journal: Callable[[Mapping[str, Any]], object] = lambda _: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """``journal`` is given the phases and notes, each a record with its unix time (``now``)."""
        self._source, self._clock = source, clock
        self._journal, self._now = journal, now
        self._total_steps, self._interval_s = total_steps, interval_s
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._phase, self._phase_done, self._phase_total, self._detail = "starting", 0, 0, ""
        self._phase_started = clock()
        self._printed = -math.inf

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        self.refresh()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None or self._phase == TRAINING or self._phase_total:
            self.refresh(force=True)  # how far it came; of what counts nothing there is no more to say
        if self._live is not None:
            self._live.stop()
            self._live = None

    async def run(self) -> None:
        """Redraw until cancelled."""
        while True:
            self.refresh()
            await asyncio.sleep(_FRAME_S if self._live is not None else min(self._interval_s, 1.0))

    def phase(self, name: str, total: int = 0, detail: str = "") -> None:
        """Begin a phase: ``"starting"``, ``"warm start"``, ``"evaluating"``, ``"training"``, ``"saving"``.

        ``total`` is how many units ``advance`` will count; training counts its own steps.
        """
        self._phase, self._phase_done, self._phase_total, self._detail = name, 0, total, detail
        self._phase_started = self._clock()
        self._journal({"time": self._now(), "phase": name, "total": total})
        self.refresh(force=True)

    def advance(self, units: int = 1, detail: str = "") -> None:
        """Count ``units`` of the phase done; ``detail`` replaces the text beside it."""
        self._phase_done += units
        self._detail = detail or self._detail

    def note(self, text: str) -> None:
        """Say something lasting, above the panel."""
        self._journal({"time": self._now(), "note": redact(text)})
        self._console.print(Text(shown(text)), soft_wrap=True)

    def refresh(self, force: bool = False) -> None:
        """Draw now; without a terminal only by ``force`` or ``interval_s`` after the last line."""
        if self._live is not None:
            self._live.update(self.panel(), refresh=True)
            return
        now = self._clock()
        if force or now - self._printed >= self._interval_s:
            self._printed = now
            self._console.print(Text(visible(self.line())), soft_wrap=True)

    def line(self) -> str:
        """The state in one line of plain text: of the figures those that one follows over hours."""
        status = self._source()
        done, total, eta = self._position(status)
        count = f" {done}/{total}" if total else ""
        parts = [f"[{duration(status.wall_s)}] {self._phase}{count}", eta, self._detail]
        if self._phase == TRAINING:
            figures = _figures(status)
            parts += [f"{label} {figures[label]}" for label in _FOLLOWED if figures[label] != _UNKNOWN]
            parts += [f"dropped {status.dropped}"] if status.dropped else []
            parts += [f"idle {idle}"] if (idle := _idle(status)) else []
        return "  ".join(filter(None, parts))

    def panel(self) -> RenderableType:
        """The state as a few short lines: a bar, then labelled figures."""
        status = self._source()
        done, total, eta = self._position(status)
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=total, completed=done, width=32) if total else Text("")
        count, times = f"{done}/{total}" if total else "", f"{duration(status.wall_s)}  {eta}".rstrip()
        head.add_row(Text(self._phase, style="bold green"), bar, Text(count), Text(times, style="dim"))
        head.columns[0].min_width = 12
        rows: list[RenderableType] = [head]
        if self._detail:
            rows.append(Text(visible(self._detail), style="dim"))
        if self._phase == TRAINING:
            figures = [*_figures(status).items()]
            grid = Table.grid(padding=(0, 2))
            for begin in range(0, len(figures), 5):
                cells = figures[begin : begin + 5]
                grid.add_row(
                    *(Text.assemble((f"{label} ", "dim"), (value, "bold")) for label, value in cells)
                )
            rows.append(grid)
            if idle := _idle(status):
                rows.append(Text.assemble(("idle ", "dim"), idle))
        if status.evals:
            text = "  ".join(f"{which} {accuracy:.3f}" for which, accuracy in status.evals.items())
            rows.append(Text.assemble(("held-out accuracy ", "dim"), (text, "bold cyan")))
        return Group(*rows)

    def _position(self, status: Status) -> tuple[int, int, str]:
        """(done, total, "eta …" or nothing) of the phase."""
        if self._phase == TRAINING:
            done, total = status.step, self._total_steps
            rate = status.steps_per_s
        else:
            done, total = self._phase_done, self._phase_total
            spent = self._clock() - self._phase_started
            rate = done / spent if spent > 0 else 0.0
        eta = f"eta {duration((total - done) / rate)}" if rate > 0 and done < total else ""
        return done, total, eta


def duration(seconds: float) -> str:
    """``75`` -> ``1:15``, ``3725`` -> ``1:02:05``."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def compact(number: float) -> str:
    """``1234`` -> ``1.2k``."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return f"{number:.0f}"


def _figures(status: Status) -> dict[str, str]:
    return {
        "reward": _number(status.reward),
        "accuracy": _number(status.accuracy),
        "staleness": _number(status.staleness, 1),
        "forks/tree": _number(status.forks_per_tree, 1),
        "version": str(status.version),
        "growing": str(status.growing),
        "queue": str(status.queue_depth),
        "gen tok/s": compact(status.generated_per_s),
        "train tok/s": compact(status.trained_per_s),
        "dropped": str(status.dropped),
    }


def _number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else _UNKNOWN


def _idle(status: Status) -> str:
    """By actor; of several engines the mean."""
    kinds: defaultdict[str, list[float]] = defaultdict(list)
    for actor, share in status.idle.items():
        kinds[re.sub(r"-\d+$", "", actor)].append(share)
    return " ".join(f"{kind}{'s' * (len(of) > 1)} {fmean(of):.0%}" for kind, of in kinds.items())
