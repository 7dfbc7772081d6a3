"""A study from end to end, at toy size, and its statistics."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.cli.main import main
from system.study.measure import Count, Forked
from system.study.report import learning
from system.study.statistics import (
    at,
    correlation_within,
    interval,
    rank_correlation,
    sign_flip_test,
    spent_to_reach,
)

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.mark.timeout(600)
def test_a_study_makes_its_runs_once_and_says_what_they_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(
        f"base: {QUICKSTART}\nwarmstart: {{steps: 4, demos: 16}}\nflow: {{batch_leaves: 16}}\n"
        "rollout: {leaves: 4, roots: 2}\neval: {questions: 4}\n"
    )
    command = ["study", "branching", str(recipe), "--seeds=1", "--steps=2", "--every=2", f"--out={tmp_path}"]
    assert main([*command, "--arms=calibrated,random"]) == 0
    study = json.loads((tmp_path / "branching.json").read_bytes())
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert set(made) == {"toy-start-s0.json", "toy-calibrated-s0.json", "toy-random-s0.json"}
    for arm in ("calibrated", "random"):
        run = study["runs"][f"toy {arm} 0"]
        assert [point["step"] for point in run["points"]] == [0, 2]
        assert run["points"][0]["tokens"] == run["points"][0]["calls"] == 0
        assert run["points"][1]["tokens"] > 2 * 16
        assert run["dropped"] == {}
    both = [study["runs"][f"toy {arm} 0"]["points"][0]["accuracy"] for arm in ("calibrated", "random")]
    assert both[0] == both[1], "they begin at the same weights"
    assert (tmp_path / "toy-tokens.png").stat().st_size > 10_000
    assert "where trees forked" in (tmp_path / "branching.html").read_text()
    assert main([*command, "--arms=random"]) == 0
    assert "ahead of random" in (tmp_path / "branching.html").read_text()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()} == made
    assert "versions of the code" not in capsys.readouterr().out
    older = tmp_path / "runs" / "toy-random-s0.json"
    older.write_text(json.dumps(json.loads(older.read_bytes()) | {"code": "12345678"}))
    assert main([*command, "--arms=calibrated,random"]) == 0
    assert "made by 2 versions of the code (" in capsys.readouterr().out
    # Trees that are left out cost what they cost; nothing is learned in a step or two.
    assert main(["study", "sampling", *command[2:], "--arms=dynamic"]) == 0
    dynamic = json.loads((tmp_path / "sampling.json").read_bytes())["runs"]["toy dynamic 0"]
    assert dynamic["dropped"]["no signal"] > 16
    assert dynamic["points"][1]["tokens"] > 2 * study["runs"]["toy random 0"]["points"][1]["tokens"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arms=greedy"], "--arms=greedy: choose among calibrated"),
        (["--seeds=0"], "--seeds=0 must be 1 or more"),
        ([], "name a recipe"),
        (["no/such.yaml"], "no such configuration file"),
        (["elsewhere/quickstart.yaml"], "two recipes of one file name"),
    ],
)
def test_a_study_that_cannot_be_is_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = [] if not words else [str(QUICKSTART)]
    assert main(["study", "branching", *recipe, *words, f"--out={tmp_path}"]) == 2
    assert said in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_run_that_fails_is_named_and_the_others_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "broken.yaml"
    recipe.write_text(f"base: {QUICKSTART}\ntask: {{name: no.such:Task}}\n")
    command = ["study", "branching", str(recipe), "--seeds=2", "--arms=random", f"--out={tmp_path}"]
    assert main(command) == 1
    told = capsys.readouterr()
    assert "broken start 0 failed" in told.out
    assert "broken start 1 failed" in told.out
    assert "2 runs failed, the first: broken start" in told.err
    assert "no module named 'no'" in told.err.lower()
    assert "Traceback" not in told.err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_a_killed_study_has_started_ends_with_it(tmp_path: Path) -> None:
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(
        f"base: {QUICKSTART}\nwarmstart: {{steps: 1, demos: 16}}\nflow: {{batch_leaves: 16}}\n"
        "rollout: {leaves: 4, roots: 2}\n"
    )
    command = ["study", "branching", str(recipe), "--seeds=1", "--arms=random", f"--out={tmp_path}"]
    began: list[psutil.Process] = []
    with subprocess.Popen([sys.executable, "-m", "actors.cli.main", *command]) as study:
        while len(began) < 3 and study.poll() is None:  # a run, and the sandbox of its tools
            time.sleep(0.2)
            began = psutil.Process(study.pid).children(recursive=True)
        study.kill()
    ended, left = psutil.wait_procs(began, timeout=60)
    for process in left:
        process.kill()
    assert len(ended) >= 3
    assert not left


# Statistics


def test_an_interval_by_students_t() -> None:
    """The textbook's: five values, t = 2.776."""
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, half) == (3.0, pytest.approx(2.776 * math.sqrt(2.5 / 5)))
    assert math.isnan(interval([2.0])[1])


def test_signs_are_flipped() -> None:
    assert sign_flip_test([1.0] * 5) == 2 / 32
    assert sign_flip_test([1.0, -1.0]) == 1.0
    assert sign_flip_test([0.0, 0.0]) == 1.0
    assert sign_flip_test(np.ones(20)) < 1e-3


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8))
def test_the_test_is_two_sided_and_a_share(differences: list[float]) -> None:
    p = sign_flip_test(differences)
    assert 2 / 2 ** len(differences) <= p <= 1
    assert p == sign_flip_test([-one for one in differences])


def test_correlation_within_groups_is_not_that_of_the_groups() -> None:
    """In each group y rises with x; over both it falls, for the second group has more x and less y."""
    x = np.concatenate([np.arange(20), 100 + np.arange(30), [0, 1]])
    y = np.concatenate([100 + np.arange(20), np.arange(30)[::-1], [5, 6]])
    groups = [*([1] * 20), *([2] * 30), *([3] * 2)]
    assert rank_correlation(x, y) < 0
    assert correlation_within(x, y, groups) == pytest.approx((20 * 1 + 30 * -1) / 50)
    assert correlation_within(x[:20], y[:20], groups[:20]) == pytest.approx(1.0)
    assert math.isnan(correlation_within([1, 2], [1, 2], [0, 0]))


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)  # with ties
    assert math.isnan(rank_correlation([1, 1], [1, 2]))


def test_curves_by_what_was_spent() -> None:
    assert at([0, 5, 10, 11], [0, 10], [0.2, 0.4])[:3].tolist() == pytest.approx([0.2, 0.3, 0.4])
    assert spent_to_reach(0.5, [0, 10, 20], [0.2, 0.4, 0.8]) == pytest.approx(12.5)
    assert spent_to_reach(0.1, [3, 10], [0.2, 0.4]) == 3
    assert math.isnan(spent_to_reach(0.9, [0, 10], [0.2, 0.4]))

    def run(*points: tuple[int, float]) -> dict[str, object]:
        return {"points": [{"tokens": tokens, "accuracy": accuracy} for tokens, accuracy in points]}

    budgets, curves = learning({"a": [run((0, 0.0), (100, 1.0))], "b": [run((0, 0.0), (50, 0.5))]}, "tokens")
    assert budgets[-1] == 50, "as far as all came"
    np.testing.assert_allclose(curves["a"], curves["b"])


def test_what_a_fork_was_good_for() -> None:
    """Below the fork of the higher ΔH the rewards differ."""
    count = Count(forks=[Forked(0.1, 0.0, 1), Forked(0.2, 0.0, 1), Forked(0.3, 0.25, 2)])
    found = count.figures()["forks"]
    assert found["count"] == 3
    assert found["correlation"] == pytest.approx(math.sqrt(3) / 2)
    assert found["variance_by_third"] == [0.0, 0.0, 0.25]
