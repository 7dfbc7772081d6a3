"""The job script's decisions on a real Slurm, with a stand-in for Ray and the driver that takes no time."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, espalier

from system.cluster.script import render
from system.cluster.status import attempts
from system.config import load

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]
CONFIGS = Path(__file__).parents[2] / "configs"

RAY = """#!/bin/bash
echo "Ray runtime started on $(hostname) $*" | tee -a "$ATTEMPT_DIR/ray"
trap 'exit 0' TERM
while :; do sleep 0.2; done
"""
DRIVER = """#!/bin/bash
# Ends as $DRIVER_ENDS says; on TERM like a run that saved a checkpoint.
echo "driver $* on $(hostname), ray at $RAY_ADDRESS, wrapped ${WRAPPED:-no}" >> "$RUN/drivers"
trap 'echo "espalier: stopped"; exit 3' TERM
case $DRIVER_ENDS in
  lost) echo "espalier: node n9 (10.0.0.9) was lost with engine-3"; exit 75;;
  ray) pkill -KILL -P "$PPID" ray; exit 1;;
  wrong) echo "espalier: learn.tp=3 must divide"; exit 2;;
  finished) until [ "$(wc -l < "$ATTEMPT_DIR/ray")" -ge "$WORKERS" ]; do sleep 0.1; done; exit 0;;
  steps)  # one each time
    echo '{"step": 1, "sft/loss": 2.0}' >> "$RUN/metrics.jsonl"
    [ "$(wc -l < "$RUN/metrics.jsonl")" -ge 2 ] || { echo "espalier: a node was lost"; exit 75; };;
  never) while :; do sleep 0.1; done;;
esac
"""
APPTAINER = """#!/bin/bash
shift; while [ "$1" != /images/espalier.sif ]; do shift; done; shift
export WRAPPED=apptainer; exec "$@"
"""
Submit = Callable[..., tuple[str, Path]]


@pytest.fixture
def submit(cluster: SlurmCluster, request: pytest.FixtureRequest) -> Submit:
    """Submit a run whose python and ray are the stand-ins above; returns the job and the run directory."""
    name = request.node.name.replace("[", "-").replace("]", "")
    programs = cluster.shared / f"{name}-venv" / "bin"
    programs.mkdir(parents=True)
    for program, text in (("ray", RAY), ("python", DRIVER), ("apptainer", APPTAINER)):
        (programs / program).write_text(text)
        (programs / program).chmod(0o755)

    def begin(ends: str, *words: str) -> tuple[str, Path]:
        env = f"slurm.env={{DRIVER_ENDS: {ends}, WORKERS: '2', PATH: '{programs}:/usr/bin:/bin'}}"
        done = espalier(
            cluster, "submit", "configs/quickstart.yaml", f"run.dir={cluster.shared}", f"run.name={name}",
            "slurm.signal_s=20", f"slurm.venv={programs.parent}", env, "--nodes", "2", *words,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        root = cluster.shared / name
        return json.loads((root / "slurm" / "submission.json").read_text())["jobs"][0], root

    return begin


def ended(root: Path) -> int:
    return sum(attempt["end"] is not None for attempt in attempts(root))


def evidence(root: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(root.rglob("*.log")))


def test_all_recipes_are_accepted_on_paper_nodes(cluster: SlurmCluster, tmp_path: Path) -> None:
    recipes = [path for path in CONFIGS.glob("*.yaml") if load(path).cluster.gpus_per_node]
    assert len(recipes) >= 11
    script = tmp_path / "job.sh"
    for path in recipes:
        for both in (False, True) if load(path).cluster.learner_nodes else (False,):
            config = load(path, ["slurm.partition=paper", f"slurm.heterogeneous={both}"])
            script.write_text(render(config, tmp_path))
            said = cluster.judge("sbatch", "--test-only", str(script))
            assert said.returncode == 0, f"{path.name} heterogeneous={both}: {said.stderr}"
    script.write_text(script.read_text().replace("--gpus-per-node=8", "--gpus-per-node=9"))
    assert cluster.judge("sbatch", "--test-only", str(script)).returncode != 0  # it does judge


def test_a_run_that_ends_well_leaves_its_chain_and_nothing_else(
    cluster: SlurmCluster, submit: Submit
) -> None:
    job, root = submit("finished")
    assert cluster.wait_end(job, 60, lambda: evidence(root)) == "COMPLETED", evidence(root)
    (attempt,) = attempts(root)
    assert attempt["end"]["next"] == "finished"
    rays = (root / "attempts" / "000" / "ray").read_text()
    assert "--head" in rays
    assert "espalier-rank=1" in rays
    assert "--resume" in (root / "drivers").read_text()
    assert not list(root.rglob("token"))
    assert cluster.left_behind() == []


def test_a_heterogeneous_job_is_one_cluster(cluster: SlurmCluster, submit: Submit) -> None:
    job, root = submit("finished", "cluster.learner_nodes=1", "slurm.heterogeneous=true", "learn.tp=1")
    assert cluster.wait_end(job, 60, lambda: evidence(root)) == "COMPLETED", evidence(root)
    rays = (root / "attempts" / "000" / "ray").read_text()
    assert "espalier-rank=1" in rays
    assert attempts(root)[0]["nodes"] == "n1,n2"
    assert cluster.left_behind() == []


def test_apptainer_wraps_the_driver(cluster: SlurmCluster, submit: Submit) -> None:
    job, root = submit("finished", "slurm.container=apptainer", "slurm.image=/images/espalier.sif")
    assert cluster.wait_end(job, 60, lambda: evidence(root)) == "COMPLETED", evidence(root)
    assert "wrapped apptainer" in (root / "drivers").read_text()


def test_infrastructure_failures_are_tried_again_but_not_for_ever(
    cluster: SlurmCluster, submit: Submit
) -> None:
    job, root = submit("lost", "slurm.max_failures=1")
    cluster.wait(lambda: ended(root) == 1, 60, "the first attempt's end", lambda: evidence(root))
    cluster.restart_now(job, 60, lambda: evidence(root))
    assert cluster.wait_end(job, 60, lambda: evidence(root)) == "FAILED"
    first, second = (attempt["end"] for attempt in attempts(root))
    assert (first["exit"], first["next"]) == (75, "requeue")
    assert first["cause"] == "node n9 (10.0.0.9) was lost with engine-3"
    assert second["next"] == "failed, 2 times in a row without a step"
    assert "2 times in a row" in espalier(cluster, "status", str(root)).stdout


def test_a_supervised_run_is_gone_on_with_by_sft(cluster: SlurmCluster, submit: Submit) -> None:
    """Its steps count as such: an attempt that has made one is no failure."""
    data = cluster.shared / "conversations.jsonl"
    data.write_text('{"prompt": "Q: 1", "completion": "a person"}\n')
    job, root = submit("steps", "--sft", f"sft.path={data}", "slurm.max_failures=0")
    cluster.wait(lambda: ended(root) == 1, 60, "the first attempt's end", lambda: evidence(root))
    cluster.restart_now(job, 60, lambda: evidence(root))
    assert cluster.wait_end(job, 60, lambda: evidence(root)) == "COMPLETED", evidence(root)
    ends = [attempt["end"] for attempt in attempts(root)]
    assert [(end["exit"], end["next"], end["trained"]) for end in ends] == [
        (75, "requeue", 1), (0, "finished", 2),
    ]  # fmt: skip
    drivers = (root / "drivers").read_text()
    assert drivers.count(f"actors.cli.main sft --resume {root} ") == 2
    shown = espalier(cluster, "status", str(root)).stdout
    assert "(supervised)" in shown
    assert "step 1 of ?, finished" in shown
    (root / "sft.json").write_text('{"conversations": 128}')
    assert "step 1 of " in (shown := espalier(cluster, "status", str(root)).stdout)
    assert "?" not in shown
    assert cluster.left_behind() == []


def test_a_driver_that_ended_with_ray_is_no_failure_of_the_run(cluster: SlurmCluster, submit: Submit) -> None:
    job, root = submit("ray", "slurm.max_failures=0")
    assert cluster.wait_end(job, 60, lambda: evidence(root)) == "FAILED"
    (attempt,) = attempts(root)
    assert (attempt["end"]["exit"], attempt["end"]["cause"]) == (75, "Ray ended on the first node")
    assert attempt["end"]["next"] == "failed, 1 times in a row without a step"


def test_a_wrong_configuration_is_not_tried_again(cluster: SlurmCluster, submit: Submit) -> None:
    job, root = submit("wrong")
    assert cluster.wait_end(job, 60, lambda: evidence(root)) == "FAILED"
    (attempt,) = attempts(root)
    assert (attempt["end"]["exit"], attempt["end"]["next"]) == (2, "failed")
    assert attempt["end"]["cause"] == "learn.tp=3 must divide"


def test_a_node_that_is_not_fit_is_named(cluster: SlurmCluster, submit: Submit) -> None:
    job, root = submit("finished", "slurm.scratch=/proc/nowhere", "slurm.requeue=false")
    assert cluster.wait_end(job, 100, lambda: evidence(root)) == "FAILED"
    (attempt,) = attempts(root)
    assert "cannot write to slurm.scratch=/proc/nowhere" in attempt["end"]["cause"]


def test_cancel_saves_and_stops_for_good(cluster: SlurmCluster, submit: Submit) -> None:
    job, root = submit("never")
    cluster.wait((root / "drivers").exists, 60, "the driver", lambda: evidence(root))
    assert "asked" in espalier(cluster, "cancel", str(root)).stdout
    assert cluster.wait_end(job, 60, lambda: evidence(root)) == "CANCELLED"
    (attempt,) = attempts(root)
    assert (attempt["end"]["exit"], attempt["end"]["next"]) == (3, "cancelled")
    assert attempt["end"]["cause"] == "espalier cancel"
    assert cluster.left_behind() == []


def test_a_cancelled_run_can_be_submitted_again(cluster: SlurmCluster, submit: Submit) -> None:
    job, root = submit("never")
    cluster.wait((root / "drivers").exists, 60, "the driver", lambda: evidence(root))
    twice = espalier(cluster, "submit", "--resume", str(root))
    assert twice.returncode == 2
    assert f"has a job already: {job} is RUNNING" in twice.stderr
    assert espalier(cluster, "cancel", str(root), "--now").returncode == 0
    assert cluster.wait_end(job, 60, lambda: evidence(root)) == "CANCELLED"
    again = espalier(cluster, "submit", "--resume", str(root), "slurm.env.DRIVER_ENDS=finished")
    assert again.returncode == 0, again.stderr
    second = json.loads((root / "slurm" / "submission.json").read_text())["jobs"][0]
    assert cluster.wait_end(second, 60, lambda: evidence(root)) == "COMPLETED", evidence(root)
    assert [attempt["attempt"] for attempt in attempts(root)] == [0, 1]
    assert cluster.left_behind() == []
