"""``espalier doctor``: each thing broken on purpose is found, by name, with what to do; nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from system.config import Config, load
from system.doctor import facts
from system.doctor.checks import GIB, examine, stops
from system.doctor.facts import Facts, all_reduce
from system.doctor.finding import Level
from system.doctor.preflight import look
from system.doctor.problem import Problem

ROOT = Path(__file__).parents[2]
WELL = Facts(
    python=(3, 12, 1),
    system="Linux",
    packages={"torch": "2.13.0+cu130", "ray": "2.60.0"},
    pins={"torch": "2.13.0", "ray": "2.60.0", "sglang": "0.5.23"},
    cpus=64,
    gpus=("H200",) * 8,
    gpus_listed=8,
    driver="580.1",
    cuda="13.0",
    sglang="0.5.23",
    nccl="2.30.7",
    sglang_nccl="2.30.7",
    collectives={"gloo": "", "nccl": ""},
    hostname="node1",
    shm_bytes=64 * GIB,
    disk_bytes=500 * GIB,
    disk_path="/runs",
    open_files=65536,
    open_files_hard=65536,
    memory_bytes=500 * GIB,
    sandbox=("namespaces",),
)


def gpu_recipe() -> Config:
    half = ["learn.tp=4", "engine.tp=4", "model.kv_heads=4"]
    return load(None, ["engine=sglang", "cluster.gpus_per_node=8", *half])


def test_a_sound_machine_has_nothing_to_mend() -> None:
    for config in (Config(), gpu_recipe()):
        assert {finding.level for finding in examine(WELL, config)} == {Level.OK}
        assert all(not finding.remedy for finding in examine(WELL, config))


Break = Callable[[Facts], Facts]
BROKEN: list[tuple[str, Level, str, Break]] = [
    ("python", Level.PROBLEM, "3.11", lambda f: replace(f, python=(3, 10, 4))),
    ("torch", Level.PROBLEM, "install", lambda f: replace(f, packages={**f.packages, "torch": None})),
    ("ray", Level.WARNING, "ray==2.60.0", lambda f: replace(f, packages={**f.packages, "ray": "2.9.0"})),
    ("gpu", Level.PROBLEM, "gpus_per_node", lambda f: replace(f, gpus=(), gpus_listed=0)),
    ("gpu", Level.PROBLEM, "CUDA_VISIBLE_DEVICES", lambda f: replace(f, gpus=f.gpus[:4])),
    ("sglang", Level.PROBLEM, "make sglang", lambda f: replace(f, sglang=None, sglang_error="make sglang")),
    ("sglang", Level.WARNING, "sglang==0.5.23", lambda f: replace(f, sglang="0.4.0")),
    ("one nccl", Level.PROBLEM, "requirements-nccl.txt", lambda f: replace(f, nccl="2.29.7")),
    ("one nccl", Level.PROBLEM, "make sglang", lambda f: replace(f, sglang_nccl="")),
    ("nccl", Level.PROBLEM, "NCCL_DEBUG", lambda f: replace(f, collectives={"gloo": "", "nccl": "no"})),
    ("gloo", Level.WARNING, "loopback", lambda f: replace(f, collectives={"gloo": "refused", "nccl": ""})),
    ("hostname", Level.WARNING, "/etc/hosts", lambda f: replace(f, hostname_error="unknown")),
    ("/dev/shm", Level.WARNING, "--shm-size", lambda f: replace(f, shm_bytes=64 << 20)),
    ("disk", Level.WARNING, "run.dir", lambda f: replace(f, disk_bytes=5 * GIB)),
    ("memory", Level.PROBLEM, "fewer", lambda f: replace(f, memory_bytes=GIB // 2)),
    ("open files", Level.PROBLEM, "ulimit -n", lambda f: replace(f, open_files=256)),
    ("sandbox", Level.PROBLEM, "tools.names", lambda f: replace(f, sandbox_error="no namespaces")),
    (
        "parts",
        Level.PROBLEM,
        "recipe",
        lambda f: replace(f, preflight={"parts": (Problem("", "reward.name='a:B': no module a"),)}),
    ),
    (  # that two checks meet it is told once
        "parts",
        Level.PROBLEM,
        "correct it in the recipe",
        lambda f: replace(f, preflight=look(load(None, ["task.name=nowhere:X"]), login=True)),
    ),
    (
        "model",
        Level.PROBLEM,
        "copy it",
        lambda f: replace(f, preflight={"task": (), "model": (Problem("model.path", "no x", "copy it"),)}),
    ),
    (
        "slurm nodes",
        Level.PROBLEM,
        "--nodes=1",
        lambda f: replace(f, slurm={"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4"}),
    ),
    (
        "slurm gpus",
        Level.WARNING,
        "gres.conf",
        lambda f: replace(f, slurm={"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4"}),
    ),
]


@pytest.mark.parametrize(("topic", "level", "word", "broken"), BROKEN)
def test_what_is_broken_is_found_and_nothing_else(topic: str, level: Level, word: str, broken: Break) -> None:
    findings = examine(broken(WELL), gpu_recipe())
    (found,) = [finding for finding in findings if finding.level is not Level.OK]
    assert (found.topic, found.level) == (topic, level)
    assert word in found.remedy
    assert stops(findings) == (level is Level.PROBLEM)


def test_settings_that_do_nothing_are_told() -> None:
    recipe = gpu_recipe()
    recipe.learn.teacher_coef = 0.5
    (found,) = [finding for finding in examine(WELL, recipe) if finding.level is not Level.OK]
    assert (found.topic, found.level) == ("settings", Level.WARNING)
    assert "learn.teacher_coef=0.5 will do nothing" in found.found


def test_the_nccl_of_an_interpreter_is_asked_for_without_a_gpu(tmp_path: Path) -> None:
    """By a program that an interpreter of either environment runs; told even where it fails."""
    assert facts._nccl(sys.executable) == (".".join(map(str, _torch_nccl())) if _torch_nccl() else "")
    fake = tmp_path / "torch.py"
    fake.write_text(
        "class version: cuda = '13.0'\nclass cuda:\n class nccl: version = staticmethod(lambda: (2, 30, 7))\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert facts._nccl(str(python)) == "2.30.7"
    assert facts._nccl(str(tmp_path / "none")).startswith("unknown")


def _torch_nccl() -> tuple[int, ...]:
    import torch

    return torch.cuda.nccl.version() if torch.version.cuda else ()


def test_what_the_recipe_does_not_need_does_not_stop_it() -> None:
    bare = replace(WELL, gpus=(), gpus_listed=0, sglang=None, sandbox_error="no", collectives={"gloo": ""})
    assert stops(examine(bare, Config()))
    assert not stops(examine(bare, load(None, ["tools.names=[search]"])))
    assert stops(examine(bare, load(None, ["tools.names=[search]", "engine=sglang"])))
    attached = load(None, ["tools.names=[search]", "engine=sglang", "engine.urls=[http://10.0.0.1:30000]"])
    assert not stops(examine(bare, attached))


def test_a_collective_that_fails_says_why() -> None:
    assert "nonsense" in all_reduce("nonsense", 1)


@pytest.mark.slow
def test_the_command_looks_at_this_machine(tmp_path: Path) -> None:
    """For real, once; and with a limit of 64 open files, which every machine can be given."""
    command = [
        sys.executable,
        "-m",
        "actors.cli.main",
        "doctor",
        "configs/quickstart.yaml",
        f"run.dir={tmp_path}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--json"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170
    )
    findings = {finding["topic"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == any(f["level"] == "problem" for f in findings.values()), done.stdout
    for topic in ("python", "torch", "megatron-core", "gloo", "ports"):
        assert findings[topic]["level"] == "ok", findings[topic]
    assert str(tmp_path) in findings["disk"]["found"]
    tight = subprocess.run(
        ["bash", "-c", 'ulimit -Sn 200; exec "$@"', "bash", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert tight.returncode == 1
    assert "problem  open files" in tight.stdout
    assert "ulimit -n" in tight.stdout
