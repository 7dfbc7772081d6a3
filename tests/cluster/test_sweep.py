"""Sweeps: which points there are, which share a job, and what their table and plot say."""

import json
from pathlib import Path
from typing import Any

import pytest

from actors.cli.main import main
from system.cluster import slurm
from system.cluster.status import attempts
from system.cluster.submit import sweep_points
from system.cluster.sweep import results, summarise
from system.config import ConfigError
from system.config.cluster import seconds
from system.doctor.preflight import require

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def test_every_combination_is_a_point() -> None:
    points = list(sweep_points(QUICKSTART, ["learn.tp=1"], ["flow.staleness=0,1", "run.seed=3,4"], require))
    assert [point.values for point in points] == [
        {"flow.staleness": "0", "run.seed": "3"},
        {"flow.staleness": "0", "run.seed": "4"},
        {"flow.staleness": "1", "run.seed": "3"},
        {"flow.staleness": "1", "run.seed": "4"},
    ]
    assert [point.config.flow.staleness for point in points] == [0, 0, 1, 1]
    assert all(point.config.learn.tp == 1 for point in points)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("flow.staleness", "write key=a,b,c"),
        ("flow.stalenes=0,1", "did you mean flow.staleness"),
        ("learn.tp=1,3", "learn.tp=3 must divide"),
        ("cluster.learner_nodes=0,1", "leaves none of cluster.nodes=1"),
    ],
)
def test_a_point_that_cannot_run_is_refused_before_any_is_submitted(sweep: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(sweep_points(QUICKSTART, [], [sweep], require))


def test_one_job_array_per_number_of_nodes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["submit", str(QUICKSTART), "--dry-run", f"run.dir={tmp_path}", "--at-once", "2"]
    assert main([*words, "--sweep", "cluster.nodes=1,2", "--sweep", "run.seed=0,1,2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("#SBATCH --array=0-2%2\n") == 2
    assert shown.count("#SBATCH --nodes=1\n") == shown.count("#SBATCH --nodes=2\n") == 1
    assert "points/003" in shown
    assert shown.count("checked here; in the job") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_that_slurm_refuses_can_be_submitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(script: Path) -> str:
        raise ConfigError(f"sbatch: no partition for {script.name}")

    monkeypatch.setattr(slurm, "sbatch", refuse)
    assert main(["submit", str(QUICKSTART), f"run.dir={tmp_path}", "run.name=one"]) == 2
    told = capsys.readouterr().err
    assert "sbatch: no partition for job.sh" in told
    assert f"not submitted; when that is mended: espalier submit --resume {tmp_path / 'one'}" in told
    monkeypatch.setattr(slurm, "sbatch", lambda script: "17")
    assert main(["submit", "--resume", str(tmp_path / "one")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def point(root: Path, name: str, ends: dict[str, Any] | None, summary: dict[str, Any] | None = None) -> None:
    run = root / "points" / name
    run.mkdir(parents=True)
    start = {"event": "start", "attempt": 0, "job": "1", "restart": 0, "nodes": "n1", "trained": 0, "time": 1}
    events = [start, *([{"event": "end", "attempt": 0, "trained": 4, "time": 9, **ends}] if ends else [])]
    (run / "attempts.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if summary:
        (run / "summary.json").write_text(json.dumps(summary))


def test_table_and_plot_show_every_point_and_its_fate(tmp_path: Path) -> None:
    after = {"accuracy": 0.75, "reward": 0.5}
    good = {"wall_s": 1800.0, "versions": 20, "tokens": {"generated": 90_000}, "eval": {"after": after}}
    point(tmp_path, "000", {"exit": 0, "cause": "", "next": "finished"}, good)
    point(tmp_path, "001", {"exit": 1, "cause": "tool python: no memory", "next": "failed"}, good)
    point(tmp_path, "002", {"exit": 3, "cause": "limit", "next": "requeue"})
    point(tmp_path, "003", None)
    names = [{"name": f"{i:03d}", "values": {"run.seed": str(i)}} for i in range(5)]
    (tmp_path / "sweep.json").write_text(json.dumps({"points": names}))
    assert main(["status", str(tmp_path)]) == 0
    text = summarise(tmp_path)
    lines = [line.split() for line in text.splitlines()]
    assert lines[1][:7] == ["000", "0", "finished", "0.75", "0.5", "40", "50"]
    assert [line[2] for line in lines[1:]] == ["finished", "failed", "waiting", "running", "waiting"]
    assert "tool python: no memory" in text
    assert results(tmp_path)[1].measures == {}  # what a failed point reached is no result
    assert "| 001 | 1 | failed |" in (tmp_path / "summary.md").read_text()
    assert json.loads((tmp_path / "summary.json").read_text())[0]["accuracy"] == 0.75
    assert (tmp_path / "summary.png").stat().st_size > 10_000


def test_an_attempt_without_an_end_is_part_of_the_chain(tmp_path: Path) -> None:
    point(tmp_path, "000", None)
    path = tmp_path / "points" / "000"
    with (path / "attempts.jsonl").open("a") as file:
        file.write('{"event": "start", "attempt": 1, "job": "1", "nodes": "n2", "trained": 0, "time": 5}\n')
        file.write(
            '{"event": "end", "attempt": 1, "exit": 0, "cause": "", "trained": 2, "next": "finished"}\n'
        )
    first, second = attempts(path)
    assert first["end"] is None
    assert second["end"]["exit"] == 0


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("04:00:00", 14_400), ("2-0", 172_800),
        ("1-12", 129_600), ("1-12:30", 131_400), ("1-00:00:01", 86_401), ("soon", None), ("1h", None),
    ],
)  # fmt: skip
def test_time_limits_read_as_slurm_reads_them(limit: str, expected: int | None) -> None:
    assert seconds(limit) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["slurm.time=10", "slurm.signal_s=600"], "leaves no time to train"),
        (["slurm.time=soon"], "write minutes"),
        (["slurm.container=pyxis"], "needs slurm.image"),
        (["slurm.heterogeneous=true", "cluster.nodes=2"], "needs cluster.learner_nodes"),
        (["run.dir=/tmp/two words"], "may have letters"),
        (['slurm.setup=["a\\nb"]'], "one line each"),
    ],
)
def test_what_cannot_be_submitted_is_said(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(QUICKSTART), "--dry-run", *words]) == 2
    assert message in capsys.readouterr().err
