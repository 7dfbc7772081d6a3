"""A credit and a branching policy of one's own train the quickstart, from a directory that is not ours."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from system.tree.store import read_trees

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]
ROOT = Path(__file__).parents[2]


def test_own_credit_and_policy_train_the_quickstart(tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples" / "treerl_credit.py", tmp_path / "mine.py")
    command = [
        sys.executable, "-m", "actors.cli.main", "train", str(ROOT / "configs" / "quickstart.yaml"),
        "run.name=own", "run.steps=3", "learn.credit=mine:ParentMean", "branching=mine:AtUnsureResults",
        "branching.options.threshold=0.05", "warmstart.steps=30", "warmstart.demos=300", "eval.questions=8",
        "observe.wandb=disabled",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=360, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trees = list(read_trees(tmp_path / "runs" / "own" / "trees"))
    decisions = [fork for tree in trees for fork in tree.forks]
    assert {fork.probability for fork in decisions} == {0.0, 1.0}  # our policies state chances
    assert "version" in (tmp_path / "runs" / "own" / "summary.json").read_text()
