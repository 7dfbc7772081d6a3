"""A sweep on a real Slurm."""

import json

import pytest
from slurm_cluster import TINY, SlurmCluster, espalier

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(540)]


def test_a_sweep_ends_in_a_table_and_a_plot(cluster: SlurmCluster) -> None:
    """Three points, of which one cannot work: no tree ends in time."""
    done = espalier(
        cluster, "submit", "configs/quickstart.yaml", f"run.dir={cluster.shared}", "run.name=sweep", *TINY,
        "run.steps=1", "learn.tp=1", "observe.wandb=disabled", "warmstart.steps=0", "slurm.time=10",
        "tools.names=[python]", "eval.questions=2",
        "--sweep", "rollout.tree_deadline_s=300,200,0.01",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    root = cluster.shared / "sweep"
    *points, closing = json.loads((root / "slurm" / "submission.json").read_text())["jobs"]
    assert len(points) == 1  # one job array

    def evidence() -> str:
        return "\n".join(path.read_text(errors="replace")[-1500:] for path in root.rglob("*.log"))

    assert cluster.wait_end(closing, 400, evidence) == "COMPLETED", evidence()
    rows = json.loads((root / "summary.json").read_text())
    assert [row["state"] for row in rows] == ["finished", "finished", "failed"], evidence()
    assert "deadline" in rows[2]["cause"]
    assert all(row["steps_per_hour"] > 0 for row in rows if row["state"] == "finished")
    assert (root / "summary.png").stat().st_size > 10_000
    assert "| 002 | 0.01 | failed |" in (root / "summary.md").read_text()
    assert "failed" in espalier(cluster, "status", str(root)).stdout
    assert cluster.left_behind() == []
