"""What lies below torch, and what nodes share: judged from made-up facts, gathered where it can be."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from system.config import Config, load
from system.doctor import cluster_checks, gpu_checks
from system.doctor.cluster_facts import Nodes, NodeSeen, gather_nodes, read
from system.doctor.finding import Finding, Level
from system.doctor.gpu_facts import LEARNER, SGLANG, Stack, TorchSeen, gather_stack, look_at, numbers

LEARNS, SERVES = TorchSeen("2.13.0+cu130", "13.0"), TorchSeen("2.14.1+cu130", "13.0")
STACK = Stack(
    driver=(580, 159, 3),
    glibc=(2, 35),
    compiler="/usr/bin/cc",
    interpreters={LEARNER: LEARNS, SGLANG: SERVES},
    gpus=8,
    memlock=-1,
)
NODES = Nodes(2, (NodeSeen("n1", 0.1, "", "580.1", 8), NodeSeen("n2", 0.3, "", "580.1", 8)))


def recipe(*more: str) -> Config:
    return load(Path(__file__).parents[2] / "configs" / "qwen3-14b-2x8.yaml", more)


def bad(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level is not Level.OK]


def test_sound_machines_have_nothing_to_mend() -> None:
    found = [*gpu_checks.examine(STACK, recipe()), *cluster_checks.examine(NODES, recipe())]
    assert {finding.level for finding in found} == {Level.OK}
    assert len(found) == 11
    assert not any(finding.remedy for finding in found)


@pytest.mark.parametrize("gpus", [0, 1])
def test_nothing_is_said_of_ways_between_gpus_where_there_are_no_two(gpus: int) -> None:
    found = [*gpu_checks.examine(replace(STACK, gpus=gpus), recipe())]
    assert "gpu to gpu" not in {one.topic for one in found}


def with_torch(name: str, seen: TorchSeen) -> Stack:
    return replace(STACK, interpreters={**STACK.interpreters, name: seen})


STACKS: list[tuple[str, Level, str, str, Stack]] = [
    (
        f"{SGLANG} torch",
        Level.PROBLEM,
        "needs driver 580; 570.86 is here",
        "updated to 580",
        replace(with_torch(LEARNER, replace(LEARNS, cuda="12.8")), driver=(570, 86)),
    ),
    (
        f"{LEARNER} torch",
        Level.PROBLEM,
        "a CPU build",
        "make gpu",
        with_torch(LEARNER, TorchSeen("2.13.0+cpu")),
    ),
    (
        f"{SGLANG} torch",
        Level.PROBLEM,
        "a CPU build",
        "make sglang BUILD=gpu",
        with_torch(SGLANG, TorchSeen("2.13.0")),
    ),
    (
        f"{SGLANG} torch",
        Level.PROBLEM,
        "No module named",
        "make sglang",
        with_torch(SGLANG, TorchSeen(error="No module named 'torch'")),
    ),
    ("glibc", Level.PROBLEM, "2.31; SGLang's kernels need 2.34", "container", replace(STACK, glibc=(2, 31))),
    ("C compiler", Level.PROBLEM, "none", "apt-get install gcc", replace(STACK, compiler="")),
    (
        "Python headers",
        Level.PROBLEM,
        f"missing for {SGLANG} Python",
        "python3-dev",
        with_torch(SGLANG, replace(SERVES, headers=False)),
    ),
    (
        "gpu to gpu",
        Level.WARNING,
        "2 of the pairs of GPUs do not reach each other's memory: 0→1, 1→0",
        "topo -m",
        replace(STACK, no_peer=((0, 1), (1, 0))),
    ),
    ("locked memory", Level.WARNING, "limit 64 KiB", "LimitMEMLOCK", replace(STACK, memlock=1 << 16)),
]


@pytest.mark.parametrize(("topic", "level", "found", "remedy", "stack"), STACKS)
def test_what_is_wrong_below_torch_is_found_and_nothing_else(
    topic: str, level: Level, found: str, remedy: str, stack: Stack
) -> None:
    (one,) = bad([*gpu_checks.examine(stack, recipe())])
    assert (one.topic, one.level) == (topic, level)
    assert found in one.found
    assert remedy in one.remedy


NODE_FAULTS: list[tuple[str, Level, str, str, Callable[[Nodes], Nodes]]] = [
    (
        "nodes",
        Level.PROBLEM,
        "1 of 2 ran a program (srun: error: n2)",
        "slurm.venv",
        lambda n: replace(n, seen=n.seen[:1], error="srun: error: n2"),
    ),
    (
        "clocks",
        Level.WARNING,
        "n2 is 9.9 s ahead of n1",
        "chrony",
        lambda n: replace(n, seen=(n.seen[0], replace(n.seen[1], clock_s=10.0))),
    ),
    (
        "shared files",
        Level.PROBLEM,
        "1 of 2 nodes do not read what is written in runs: n2 (No such file",
        "run.dir",
        lambda n: replace(n, seen=(n.seen[0], replace(n.seen[1], shares="No such file or directory"))),
    ),
    (
        "nodes alike",
        Level.PROBLEM,
        "of the 8 GPUs per node: n1 has 4",
        "--exclude",
        lambda n: replace(n, seen=(replace(n.seen[0], gpus=4), n.seen[1])),
    ),
    (
        "nodes alike",
        Level.WARNING,
        "driver 570.2 and 580.1",
        "--constraint",
        lambda n: replace(n, seen=(replace(n.seen[0], driver="570.2"), n.seen[1])),
    ),
]


@pytest.mark.parametrize(("topic", "level", "found", "remedy", "broken"), NODE_FAULTS)
def test_what_is_wrong_between_nodes_is_found_and_nothing_else(
    topic: str, level: Level, found: str, remedy: str, broken: Callable[[Nodes], Nodes]
) -> None:
    (one,) = bad([*cluster_checks.examine(broken(NODES), recipe())])
    assert (one.topic, one.level) == (topic, level)
    assert found in one.found
    assert remedy in one.remedy


def test_nobody_is_told_of_what_the_recipe_does_not_need() -> None:
    broken = replace(STACK, driver=(450,), glibc=(2, 17), memlock=0)
    assert [*gpu_checks.examine(broken, Config())] == []
    assert gather_stack(Config(), "580.1") == Stack()
    one_node = recipe("cluster.nodes=1", "cluster.learner_nodes=0", "learn.dp=1", "engine.replicas=2")
    assert "locked memory" not in {finding.topic for finding in gpu_checks.examine(broken, one_node)}
    attached = {f.topic for f in gpu_checks.examine(broken, recipe("engine.urls=[http://10.0.0.1:1]"))}
    assert "glibc" not in attached
    cpu = load(None, ["cluster.nodes=2"])
    assert (
        bad(
            [*cluster_checks.examine(replace(NODES, seen=tuple(replace(n, gpus=0) for n in NODES.seen)), cpu)]
        )
        == []
    )


def test_a_login_node_has_no_driver_to_judge() -> None:
    login = replace(STACK, driver=())
    assert bad([*gpu_checks.examine(login, recipe())]) == []


def test_versions_are_numbers() -> None:
    assert numbers("580.159.03") == (580, 159, 3)
    assert numbers("13.0") == (13, 0)
    assert numbers("") == numbers("N/A") == ()


def test_this_machine_says_what_it_has() -> None:
    import torch

    seen = look_at(sys.executable)
    assert seen.torch == torch.__version__
    assert seen.cuda == (torch.version.cuda or "")
    assert "No module named 'torch'" in look_at_without_torch().error
    assert look_at("/no/such/python").error
    found = gather_stack(recipe("engine.urls=[http://10.0.0.1:1]"), "")
    assert found.interpreters == {LEARNER: seen}
    assert found.glibc >= (2, 17)
    assert found.compiler is not None
    assert found.memlock is not None
    if not torch.cuda.is_available():
        assert (found.gpus, found.no_peer) == (0, ())


def look_at_without_torch() -> TorchSeen:
    """An interpreter without packages."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        python = Path(place) / "python"
        python.write_text(f'#!/bin/sh\nunset PYTHONPATH\nexec {sys.executable} -I -S "$@"\n')
        python.chmod(0o755)
        return look_at(str(python))


SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_PROCID=0 "$@"
[ "$SRUN_NODES" = 1 ] || SLURM_PROCID=1 "$@"
[ "$SRUN_NODES" = 2 ] || { echo "srun: error: n2: task 1: Exited" >&2; exit 1; }
"""


@pytest.mark.parametrize("running", [1, 2])
def test_an_allocations_nodes_are_asked_by_one_srun(
    running: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SRUN_NODES", str(running))
    shared = tmp_path / "shared"
    shared.mkdir()
    seen = gather_nodes({"SLURM_JOB_NUM_NODES": "2"}, shared)
    assert (seen.asked, len(seen.seen)) == (2, running)
    assert all(node.shares == "" and -20 < node.clock_s < 0.5 for node in seen.seen)
    assert seen.error == ("" if running == 2 else "srun: error: n2: task 1: Exited")
    assert [*shared.iterdir()] == []
    # One node, no job, or within a step: nobody is asked.
    for slurm in ({}, {"SLURM_JOB_NUM_NODES": "1"}, {"SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_ID": "0"}):
        assert gather_nodes(slurm, shared) == Nodes()
    shell = {"SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_ID": "4294967290"}  # salloc's
    assert gather_nodes(shell, shared).asked == 2


def test_nodes_that_do_not_answer_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    began = time.monotonic()
    assert gather_nodes({"SLURM_JOB_NUM_NODES": "2"}, tmp_path, 0.5) == Nodes(2, (), "no more within 0.5 s")
    assert time.monotonic() - began < 30
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert gather_nodes({"SLURM_JOB_NUM_NODES": "2"}, tmp_path).error == "srun: No such file or directory"


def test_a_node_that_reads_something_else_does_not_share() -> None:
    told = {"name": "n1", "seen": "another", "drivers": ["580.1", "580.1"], "time": 107.5}
    late = (104.0, told | {"time": 107.6})
    assert read([(100.0, told), late], "token") == NodeSeen("n1", 7.5, "another", "580.1", 2)
