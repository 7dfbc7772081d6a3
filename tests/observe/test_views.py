"""The contract of every view of the metrics, held against each that is registered."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from view_sessions import free_port, of_wandb

from system.config import ConfigError, load
from system.observe import views
from system.observe.rundir import RunDir
from system.observe.sinks import RESUMED, Alarm, GuardedView, MetricsView, RunFiles, identity
from system.observe.spans import PhaseSpan
from system.observe.tree_table import COLUMNS
from system.observe.views import VIEWS, sinks, unavailable

HERE = Path(__file__).parent


SETTINGS = {
    "Weights & Biases": lambda: "observe.wandb=offline",
    "TensorBoard": lambda: "observe.tensorboard=true",
    "trackio": lambda: "observe.trackio=true",
    "Prometheus": lambda: f"observe.prometheus={free_port()}",
    "OpenTelemetry": lambda: "observe.otel=http://127.0.0.1:9",
}


def test_every_registered_view_is_held_against_the_contract() -> None:
    assert SETTINGS.keys() == VIEWS.keys()


def held_after_two_sessions(name: str, run_dir: RunDir) -> dict[str, list[tuple[int, float]]]:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "TRACKIO"))
    }
    words = [sys.executable, str(HERE / "view_sessions.py"), name, str(run_dir.root), SETTINGS[name]()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=170, env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    (line,) = done.stdout.splitlines()  # nothing else on the console
    if name == "Weights & Biases":
        return of_wandb(run_dir)
    return {key: [(int(step), value) for step, value in rows] for key, rows in json.loads(line).items()}


@pytest.mark.parametrize("name", ["Weights & Biases", "TensorBoard", "trackio"])
def test_it_holds_every_step_once_and_in_order(name: str, run_dir: RunDir) -> None:
    held = held_after_two_sessions(name, run_dir)
    later = 2 if VIEWS[name].rewinds else 1  # whose records of the steps that were done twice are shown
    expected = [(1, 1.01), (2, 1.02), (3, later + 0.03), (4, later + 0.04), (5, 2.05)]
    assert [(step, pytest.approx(value, abs=1e-6)) for step, value in held["train/loss"]] == expected
    assert [step for step, _ in held["rollout/trees"]] == [1, 2, 3, 4, 5]
    assert [(step, round(value, 5)) for step, value in held["eval/accuracy"]] == [(0, 0.1), (5, 0.9)]
    # What is not known is not shown as a number.
    known = [(step, value) for step, value in held["train/entropy"] if math.isfinite(value)]
    assert known == [(1, 0.5), (3, 0.5), (4, 0.5), (5, 0.5)]
    assert not [
        path for path in run_dir.root.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()
    ]

    if name == "Weights & Biases":
        assert_wandb(run_dir)
    if name == "TensorBoard":
        assert any(b"0.01 nats per token" in path.read_bytes() for path in run_dir.tensorboard.iterdir())


def assert_wandb(run_dir: RunDir) -> None:
    """One W&B run, whose alarm was told; a table of the newest trees with each evaluation."""
    logs = list(run_dir.wandb.glob("offline-run-*/run-*.wandb"))
    assert [identity(run_dir.wandb) in log.name for log in logs] == [True, True]
    assert sum(log.read_bytes().count(b"demo-s0: entropy collapse") for log in logs) == 1
    tables = [json.loads(path.read_bytes()) for path in run_dir.wandb.rglob("*.table.json")]
    assert len(tables) == 2
    for table in tables:
        assert table["columns"] == [*COLUMNS]
        assert [row[0] for row in table["data"]] == ["q1", "q2"]
        assert [row[7] for row in table["data"]] == [0.5, 0.5]
        assert all("2 of 3 leaves" in row[-1] or "3 of 3 leaves" in row[-1] for row in table["data"])


def test_prometheus_shows_the_newest_step_and_sums_up_counts(run_dir: RunDir) -> None:
    held = held_after_two_sessions("Prometheus", run_dir)
    assert held["espalier_step"] == [(5, 5.0)]
    assert held["espalier_train_loss"] == [(5, 2.05)]
    assert held["espalier_rollout_trees_total"] == [(5, 24.0)]  # of this session's steps 3, 4, 5
    assert held["espalier_tools_p95_seconds"] == [(5, 0.25)]
    assert held["espalier_eval_accuracy_ratio"] == [(5, 0.9)]


class Failing(MetricsView):
    """Fails at one of the things that a view does."""

    def __init__(self, at: str, error: BaseException) -> None:
        self.at, self.error, self.tried, self.closed = at, error, 0, Event()
        self._at("start")

    def _at(self, what: str) -> None:
        if what == self.at:
            self.tried += 1
            raise self.error

    def write(self, record: Any) -> None:
        self._at("write")

    def rewind(self, step: int) -> None:
        self._at("rewind")

    def alarm(self, alarm: Alarm) -> None:
        self._at("alarm")

    def span(self, span: PhaseSpan) -> None:
        self._at("span")

    def close(self) -> None:
        self._at("close")
        self.closed.set()


@pytest.mark.parametrize(
    "error", [RuntimeError("disk full at https://u:hunter2@host"), SystemExit("no login")]
)
@pytest.mark.parametrize("at", ["start", "write", "rewind", "alarm", "span", "close"])
@pytest.mark.parametrize("aside", [False, True])
@pytest.mark.parametrize("name", VIEWS)
def test_a_failure_is_told_once_and_stops_nothing(
    name: str,
    at: str,
    aside: bool,
    error: BaseException,
    run_dir: RunDir,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made: list[Failing] = []

    def make() -> MetricsView:
        made.append(Failing(at, error))
        return made[0]

    sink = GuardedView(name, VIEWS[name].off, make, run_dir.metrics_path, aside=aside)
    sink.write({RESUMED: 0, "time": 1.0})
    for step in range(3):
        sink.write({"step": step, "time": 1.0})
        sink.alarm(Alarm(step, 1.0, "x", True, "y"))
        sink.span(PhaseSpan("train", 1.0, 2.0, {}))
    sink.close()
    sink.close()
    said = capsys.readouterr().err
    assert said.count("WARNING") == 1
    assert name in said
    assert VIEWS[name].off in said
    assert "hunter2" not in said
    assert [one.tried for one in made] == ([] if at == "start" else [1])
    assert all(one.closed.wait(30.0) for one in made if at != "close"), "it lets go of what it held"


class Slow(MetricsView):
    """Starts when it is told to."""

    def __init__(self, go: Event) -> None:
        assert go.wait(30.0)
        self.got: list[Any] = []

    def write(self, record: Any) -> None:
        self.got.append(record["step"])

    def alarm(self, alarm: Alarm) -> None:
        self.got.append(alarm.name)


def test_what_comes_while_one_starts_aside_waits_for_it(run_dir: RunDir) -> None:
    go, made = Event(), list[Slow]()

    def make() -> MetricsView:
        made.append(Slow(go))
        return made[0]

    run_dir.metrics_path.write_text('{"step": 1}\n')  # sent by an earlier session
    sink = GuardedView("slow", "slow=false", make, run_dir.metrics_path, aside=True)
    sink.write({"step": 1, "time": 1.0})
    sink.write({"step": 2, "time": 1.0})
    run_dir.metrics_path.write_text('{"step": 1}\n{"step": 2}\n')
    sink.alarm(Alarm(2, 1.0, "x", True, "y"))
    assert not made
    go.set()
    assert sink.ready()
    sink.write({"step": 3, "time": 1.0})
    sink.close()
    assert made[0].got == [2, "x", 3]


def test_one_that_does_not_start_is_not_waited_for_for_ever(
    run_dir: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    go, closed = Event(), Event()

    class Late(Slow):
        def close(self) -> None:
            assert self.got == []
            closed.set()

    sink = GuardedView("late", "late=false", lambda: Late(go), run_dir.metrics_path, aside=True, start_s=0.05)
    sink.write({"step": 1, "time": 1.0})
    sink.close()
    sink.write({"step": 2, "time": 1.0})
    sink.close()
    said = capsys.readouterr().err
    assert said.count("WARNING: late did not start: not within 0.05 s") == 1
    go.set()
    assert closed.wait(30.0), "what starts after all is let go"
    assert not capsys.readouterr().err


def test_one_that_takes_back_what_it_was_sent_gets_it_again(run_dir: RunDir) -> None:
    go = Event()
    go.set()
    made: list[Slow] = []

    def make() -> MetricsView:
        made.append(Slow(go))
        return made[0]

    sink = GuardedView("again", "again=false", make, None)
    for step in (1, 2, 1):
        sink.write({"step": step, "time": 1.0})
    sink.close()
    assert made[0].got == [1, 2, 1]


def test_one_whose_library_is_missing_is_refused_with_the_remedy(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = [setting() for setting in SETTINGS.values()]
    monkeypatch.setattr(views, "find_spec", lambda package: None)
    told = list(unavailable(load(None, on)))
    assert len(told) == len(VIEWS)
    for line, one in zip(told, VIEWS.values(), strict=True):
        assert (
            line == f"{one.setting}: {one.name} is not installed: pip install '{one.pip}', or set {one.off}"
        )
    off = [one.off for one in VIEWS.values()]
    assert list(unavailable(load(None, off))) == []
    assert [type(one) for one in sinks(run_dir, load(None, off))] == [RunFiles]
    assert not run_dir.wandb.exists()
    monkeypatch.undo()
    assert list(unavailable(load(None, on))) == []


def test_a_port_in_use_is_refused_with_the_remedy() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (told,) = unavailable(load(None, [f"observe.prometheus={taken.getsockname()[1]}"]))
    assert "nothing can listen there (Address already in use)" in told
    assert "choose a free port" in told


@pytest.mark.parametrize("text", ["here", "70000", "1.2.3.4", "host:1:2/x", "-1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no address to listen at"):
        load(None, [f"observe.prometheus={text}"])


def test_the_name_of_a_run_stays(run_dir: RunDir) -> None:
    assert identity(run_dir.trackio) == identity(run_dir.trackio)
