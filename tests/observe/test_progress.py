from __future__ import annotations

import asyncio
import io
from dataclasses import replace

import pytest
from rich.console import Console

from system.observe.progress import Progress, compact, duration
from system.observe.recorder import Status

STATUS = Status(
    step=30,
    version=30,
    wall_s=90.0,
    reward=0.5,
    accuracy=0.625,
    staleness=1.25,
    forks_per_tree=2.5,
    queue_depth=3,
    growing=12,
    generated_per_s=1234.0,
    trained_per_s=999.0,
    steps_per_s=0.5,
    dropped=4,
    idle={"engine": 0.12, "learner": 0.34},
    evals={"before": 0.41},
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(clock: Clock, status: Status = STATUS) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=False)
    return Progress(lambda: status, total_steps=100, interval_s=2.0, console=console, clock=clock), out


def test_the_training_line_says_what_one_follows_and_is_no_longer_than_a_screen():
    idle = {f"engine-{i}": share for i, share in enumerate((0.1, 0.3, 0.2))}
    progress, out = plain(Clock(), replace(STATUS, idle={**idle, "learner": 0.34, "rollout": 0.07}))
    progress.phase("training")
    assert out.getvalue().splitlines()[-1] == (
        "[1:30] training 30/100  eta 2:20  reward 0.50  accuracy 0.62  staleness 1.2  forks/tree 2.5  "
        "gen tok/s 1.2k  dropped 4  idle engines 20% learner 34% rollout 7%"
    )


def test_the_panel_says_everything_asked_for():
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system=None)
    with Progress(lambda: STATUS, total_steps=100, interval_s=2.0, console=console) as progress:
        progress.phase("training")
    for part in (
        *(
            "1:30  eta 2:20",
            "30/100",
            "reward 0.50",
            "accuracy 0.62",
            "staleness 1.2",
            "queue 3",
            "growing 12",
        ),
        *("gen tok/s 1.2k", "train tok/s 999", "forks/tree 2.5", "idle engine 12% learner 34%", "dropped 4"),
    ):
        assert part in out.getvalue()


def test_unknown_figures_are_left_out_or_dashes_not_nan():
    progress, out = plain(Clock(), Status())
    progress.phase("training")
    assert out.getvalue() == "[0:00] training 0/100  gen tok/s 0\n"
    console = Console(file=out, width=100, force_terminal=True, color_system=None)
    console.print(progress.panel())
    assert "nan" not in out.getvalue()
    assert "reward –" in out.getvalue()


def test_what_counts_nothing_is_said_once():
    progress, out = plain(Clock())
    with progress:
        progress.phase("saving")
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["starting", "saving"]


def test_other_phases_count_their_own_units():
    clock = Clock()
    progress, out = plain(clock)
    progress.phase("warm start", total=50)
    clock.now = 10.0
    progress.advance(20, "loss 1.2")
    progress.refresh(force=True)
    line = out.getvalue().splitlines()[-1]
    assert "warm start 20/50  eta 0:15  loss 1.2" in line
    assert "reward" not in line


def test_one_line_per_interval_without_a_terminal():
    clock = Clock()
    progress, out = plain(clock)
    with progress:
        progress.phase("training")
        for tenth in range(1, 41):
            clock.now = tenth / 10
            progress.refresh()
        assert len(out.getvalue().splitlines()) == 4  # starting, and at 0, 2 and 4 s
    assert len(out.getvalue().splitlines()) == 5  # and a last one
    assert "\x1b" not in out.getvalue()


def test_a_terminal_gets_a_panel_and_notes_above_it():
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True)
    with Progress(lambda: STATUS, total_steps=100, interval_s=2.0, console=console) as progress:
        progress.phase("training")
        progress.note("[bold]eval[/bold] before 0.41")
    shown = out.getvalue()
    assert "[bold]eval[/bold] before 0.41" in shown  # a note is text, not markup
    for part in ("training", "30/100", "0.625"[:4], "1.2k", "held-out accuracy"):
        assert part in shown
    assert shown.endswith("\x1b[?25h")  # the cursor is back


async def test_run_redraws_until_cancelled():
    progress, out = plain(Clock())
    with progress:
        task = asyncio.create_task(progress.run())
        await asyncio.sleep(0.05)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert out.getvalue()


def test_numbers_for_people():
    assert [duration(s) for s in (0, 59.6, 75, 3725)] == ["0:00", "1:00", "1:15", "1:02:05"]
    assert [compact(n) for n in (7.4, 999, 1234, 2.5e6, 3e9)] == ["7", "999", "1.2k", "2.5M", "3.0G"]


def test_phases_and_notes_go_to_the_journal_with_their_times_and_without_secrets():
    journal: list[dict[str, object]] = []
    console = Console(file=io.StringIO())
    with Progress(
        lambda: STATUS,
        total_steps=40,
        interval_s=1.0,
        console=console,
        journal=journal.append,
        now=lambda: 7.0,
    ) as progress:
        progress.phase("warm start", total=300)
        progress.note("the engine at http://me:hunter2@host/ is slow")
    assert journal[0] == {"time": 7.0, "phase": "warm start", "total": 300}
    assert journal[1]["time"] == 7.0
    assert "is slow" in str(journal[1]["note"])
    assert "hunter2" not in str(journal[1]["note"])
