"""The real job script on a real Slurm: two nodes, a time limit, a lost node."""

import contextlib
import json
import math
from collections import Counter
from typing import Any

import pytest
from slurm_cluster import TINY, SlurmCluster, espalier

from system.chaos.account import surviving_history
from system.cluster.status import attempts
from system.observe.jsonl import read_jsonl
from system.observe.rundir import RunDir

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(540)]


class Submitted:
    """A run that was handed to Slurm."""

    def __init__(self, cluster: SlurmCluster, name: str, *words: str) -> None:
        self.cluster, self.root = cluster, cluster.shared / name
        place = (f"run.dir={cluster.shared}", f"run.name={name}")
        done = espalier(cluster, "submit", "configs/quickstart-tp2.yaml", *place, *TINY, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        self.plan = done.stdout
        self.job = json.loads((self.root / "slurm" / "submission.json").read_text())["jobs"][0]

    def trained(self) -> int:
        """Steps made so far."""
        if RunDir.open(self.root).supervised:
            return sum("sft/loss" in record for record in read_jsonl(self.root / "metrics.jsonl"))
        path = self.root / "ledger.jsonl"
        return sum(e["event"] == "trained" for e in read_jsonl(path)) if path.is_file() else 0

    def ends(self) -> list[dict[str, Any]]:
        return [attempt["end"] for attempt in attempts(self.root) if attempt["end"]]

    def wait_trained(self, steps: int, seconds: float) -> None:
        self.cluster.wait(lambda: self.trained() >= steps, seconds, f"{steps} steps", self.evidence)

    def end_after(self, steps: int, key: str = "run.steps") -> None:
        """Shorten the run, as a user may between two attempts."""
        directory = RunDir.open(self.root)
        directory.write_config(directory.config((f"{key}={steps}",)))

    def evidence(self) -> str:
        return "\n".join(
            f"== {path.relative_to(self.root)}\n"
            + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.root.rglob("*.log"))
            if "wandb" not in path.parts
        )


def test_two_nodes_a_time_limit_and_a_lost_node(cluster: SlurmCluster) -> None:
    """One run, three attempts: Megatron's two ranks on two nodes, stopped by a limit, then by a dead node."""
    run = Submitted(cluster, "story", "--nodes", "2", "--time", "00:30:00", "run.steps=1000")
    assert "learner rank 0" in run.plan
    assert "learner rank 1, 1 engine" in run.plan

    # Slurm warns as the limit comes near: the run checkpoints and the job requeues itself.
    run.wait_trained(2, 240)
    hours, minutes, seconds = map(int, cluster.job(run.job)["RunTime"].split(":"))
    limit = math.ceil(hours * 60 + minutes + (seconds + 30) / 60)  # 30 s at least to stop in
    cluster.slurm("scontrol", "update", f"jobid={run.job}", f"TimeLimit={limit}")
    cluster.restart_now(run.job, 120, run.evidence)
    (first,) = run.ends()
    assert (first["exit"], first["next"]) == (3, "requeue"), run.evidence()
    assert "limit" in first["cause"]
    cluster.slurm("scontrol", "update", f"jobid={run.job}", "TimeLimit=30")

    # A power cut on the second node: the run ends by itself, names it, and goes on on the third.
    done = run.trained()
    assert first["trained"] == done >= 2, run.evidence()
    run.wait_trained(done + 1, 240)
    with contextlib.ExitStack() as powerless:
        if not cluster.namespaces:  # no node to kill: once more the warning
            run.end_after(run.trained() + 2)
            cluster.slurm("scancel", "--batch", "--signal=USR1", run.job)
            cluster.restart_now(run.job, 120, run.evidence)
        else:
            powerless.enter_context(cluster.power_cut("n2"))
            cluster.wait(lambda: len(run.ends()) == 2, 90, "the attempt's end", run.evidence)
            second = run.ends()[1]
            assert second["exit"] == 75, run.evidence()
            # Slurm sees the dead node itself, somewhat later.
            assert second["next"] in ("requeue", "left to Slurm")
            assert "node n2" in second["cause"]
            run.end_after(run.trained() + 2)
            cluster.wait(lambda: "down" in cluster.node_state("n2"), 60, "n2 to be down")
            cluster.restart_now(run.job, 90, run.evidence)
        assert cluster.wait_end(run.job, 240, run.evidence) == "COMPLETED", run.evidence()

    steps = RunDir.open(run.root).config().run.steps
    summary = json.loads((run.root / "summary.json").read_text())
    assert summary["versions"] == steps
    history = surviving_history(list(read_jsonl(run.root / "ledger.jsonl")))
    assert len(history) == steps * 8
    assert max(Counter(history).values()) == 1  # each prompt once
    if cluster.namespaces:
        assert cluster.job(run.job)["NodeList"] == "n[1,3]"

    # What a user sees of it: a chain of attempts, one W&B run, a log per component, no process left.
    shown = espalier(cluster, "status", str(run.root)).stdout
    assert f"step {steps} of {steps}, finished" in shown
    assert "attempt 0" in shown
    assert "attempt 1" in shown
    sessions = [path.name for path in (run.root / "wandb").glob("offline-run-*")]
    assert len({name.rsplit("-", 1)[1] for name in sessions}) == 1
    assert len(sessions) == len(attempts(run.root))
    logs = {path.stem for path in (run.root / "attempts" / "000" / "logs").glob("*.log")}
    assert {"driver", "node-0", "node-1", "learner-0", "learner-1", "engine-0", "tool-python"} <= logs
    assert "reward" in espalier(cluster, "logs", str(run.root), "driver").stdout
    assert not list(run.root.rglob("token"))
    assert cluster.left_behind() == []


def test_a_run_goes_on_without_a_node_that_it_can_spare(cluster: SlurmCluster) -> None:
    if not cluster.namespaces:
        pytest.skip("no namespaces: a node of this cluster cannot be killed alone")
    run = Submitted(
        cluster, "spare", "--nodes", "3", "run.steps=12", "learn.tp=1", "engine.replicas=2",
        "rollout.workers=2", "cluster.on_node_loss=continue", "slurm.requeue=false", "observe.wandb=disabled",
    )  # fmt: skip
    run.wait_trained(2, 240)
    with cluster.power_cut("n3"):
        assert cluster.wait_end(run.job, 240, run.evidence) == "COMPLETED", run.evidence()
    assert len(run.ends()) == 1
    assert "node n3 was lost" in (run.root / "attempts/000/logs/driver.log").read_text()
    history = surviving_history(list(read_jsonl(run.root / "ledger.jsonl")))
    assert len(history) == 12 * 8
    assert max(Counter(history).values()) == 1
    assert cluster.left_behind() == []


def test_a_supervised_run_over_two_nodes_goes_on_after_a_warning(cluster: SlurmCluster) -> None:
    said = " <search> person Halwin </search> <result> a person </result> <answer> a </answer>"
    rows = [{"prompt": f"Q: {n}", "completion": said} for n in range(8)]
    data = cluster.shared / "taught.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Submitted(
        cluster, "taught", "--sft", "--nodes", "2", f"sft.path={data}", "task.tools_in_prompt=none",
        "sft.batch=8", "sft.epochs=100000",  # of a step each
        "sft.choose=pass@1", "sft.candidate_every=100000",  # by engines, once the learner is gone
    )  # fmt: skip
    assert "once the learner is gone" in run.plan
    run.wait_trained(2, 240)
    cluster.slurm("scancel", "--batch", "--signal=USR1", run.job)
    cluster.wait(lambda: len(run.ends()) == 1, 120, "the attempt's end", run.evidence)
    steps = run.trained() + 3
    run.end_after(steps, "sft.epochs")
    cluster.restart_now(run.job, 120, run.evidence)
    assert cluster.wait_end(run.job, 240, run.evidence) == "COMPLETED", run.evidence()
    first, second = run.ends()
    assert (first["exit"], first["next"], first["trained"]) == (3, "requeue", steps - 3), run.evidence()
    assert (second["exit"], second["trained"]) == (0, steps), run.evidence()
    summary = json.loads((run.root / "summary.json").read_text())
    assert (summary["steps"], summary["chosen"]["by"]) == (steps, "pass@1")
    assert "solved" in summary["candidates"][0]
    assert (run.root / "model" / "README.md").is_file()
    shown = espalier(cluster, "status", str(run.root)).stdout
    assert f"step {steps} of {steps}, finished" in shown
    logs = {path.stem for path in (run.root / "attempts" / "001" / "logs").glob("*.log")}
    assert {"driver", "learner-0", "learner-1"} <= logs
    assert cluster.left_behind() == []
