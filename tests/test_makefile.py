"""`make sglang` and `make gpu` take the build that was meant and say why; containers install by them."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONTAINER = ROOT / "slurm" / "container"
NEEDS = ROOT / "system" / "engine" / "sglang"
# Stands for every python: a venv is a copy of it, pip and torch do what the test says.
PYTHON = """#!/bin/sh
echo "$(dirname "$0") $*" >> "$CALLS"
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python";;
  -c*) case "$2" in *torch*) [ "$TORCH" = cuda ];; esac;;
esac
"""


class Machine:
    """A checkout's Makefile on a machine with these programs."""

    def __init__(self, place: Path, *programs: str) -> None:
        self.place, self.calls = place / "checkout", place / "calls"
        (self.place / "system/engine/sglang").mkdir(parents=True)
        (self.place / "system/agents/verifiers").mkdir(parents=True)
        (self.place / "system/bench").mkdir()
        for name in (
            "system/bench/trl-requirements.txt",
            "system/agents/verifiers/requirements.txt",
            "Makefile",
            "pyproject.toml",
            *(f"system/engine/sglang/{p.name}" for p in NEEDS.glob("*.txt")),
        ):
            shutil.copy(ROOT / name, self.place / name)
        self.bin = place / "bin"
        self.bin.mkdir()
        for name in ("sh", "make", "cat", "echo", "test", "touch", "mkdir", "cp", "dirname", "rm"):
            (self.bin / name).symlink_to(shutil.which(name) or name)
        for name in programs:
            self.program(name, "#!/bin/sh\n")
        self.program("python3", PYTHON)

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def make(self, *words: str, torch: str = "cuda") -> tuple[int, str, str]:
        """(exit code, what it said, what pip was asked to install since)."""
        self.calls.write_text("")
        env = {"PATH": str(self.bin), "CALLS": str(self.calls), "TORCH": torch}
        command = ["make", "--no-print-directory", *words]
        done = subprocess.run(command, cwd=self.place, env=env, capture_output=True, text=True, timeout=60)
        installs = [line for line in self.calls.read_text().splitlines() if " pip install " in line]
        return done.returncode, done.stdout + done.stderr, "\n".join(installs)


@pytest.mark.parametrize(
    ("programs", "words", "build", "why"),
    [
        (["nvidia-smi"], [], "gpu", "since nvidia-smi lists a GPU"),
        (["nvidia-smi", "sbatch"], [], "gpu", "since nvidia-smi lists a GPU"),
        ([], [], "cpu", "since nvidia-smi lists no GPU here; BUILD=gpu for others"),
        ([], ["BUILD=gpu"], "gpu", "as BUILD=gpu says"),
        (["sbatch"], ["BUILD=gpu"], "gpu", "as BUILD=gpu says"),
        (["sbatch"], ["BUILD=cpu"], "cpu", "as BUILD=cpu says"),
        (["nvidia-smi"], ["BUILD=cpu"], "cpu", "as BUILD=cpu says"),
    ],
)
def test_sglang_is_installed_as_meant_and_says_why(
    programs: list[str], words: list[str], build: str, why: str, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, *programs)
    code, said, installs = machine.make("sglang", *words)
    assert code == 0, said
    assert f"SGLang: the {build} build" in said
    assert why in said
    assert ("requirements-gpu.txt" in installs) == ("requirements-nccl.txt" in installs) == (build == "gpu")
    assert ("requirements-cpu.txt" in installs) == (build == "cpu")
    again = machine.make("sglang")
    assert again == (0, f"SGLang: the {build} build, which .venv-sglang holds\n", "")
    other = {"gpu": "cpu", "cpu": "gpu"}[build]
    code, said, installs = machine.make("sglang", f"BUILD={other}")
    assert (code, installs) == (2, "")
    assert f"holds the {build} build: rm -r .venv-sglang, and again: make sglang BUILD={other}" in said


def test_a_login_node_is_asked_not_guessed_for(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "sbatch")
    code, said, installs = machine.make("sglang")
    assert (code, installs) == (2, "")
    assert "is this its login node?" in said
    assert "make sglang BUILD=gpu" in said
    assert "make sglang BUILD=cpu" in said
    assert not (machine.place / ".venv-sglang").exists()
    code, said, installs = machine.make("sglang", "BUILD=cuda")
    assert (code, installs) == (2, "")
    assert "BUILD=cuda: it is gpu or cpu" in said


def test_make_gpu_installs_both_environments_for_gpus_also_where_there_is_none(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "sbatch")
    code, said, installs = machine.make("gpu")
    assert code == 0, said
    learner, nccl, *_, both = [
        line for line in installs.splitlines() if "[dev,gpu]" in line or "-nccl" in line
    ]
    assert ".venv/bin" in learner
    assert ".venv/bin" in nccl
    assert ".venv-sglang/bin" in both
    assert all("--no-deps" in line for line in (nccl, both))
    assert "SGLang: the gpu build, as BUILD=gpu says" in said


def test_make_gpu_refuses_a_cpu_build_of_torch(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    code, said, installs = machine.make("gpu", torch="cpu")
    assert code == 2
    assert ".venv holds a CPU build of PyTorch" in said
    assert "sglang" not in installs


def installed_once(machine: Machine, target: str) -> str:
    """What ``make target`` had pip install, into an environment of its own, and no second time."""
    code, said, installs = machine.make(target)
    assert code == 0, said
    assert f".venv-{target}/bin -m pip install" in installs
    assert ".venv/bin -m pip install" not in installs
    assert machine.make(target)[2] == ""
    return installs


def test_make_verifiers_installs_its_pins_once_into_an_environment_of_its_own(tmp_path: Path) -> None:
    installs = installed_once(Machine(tmp_path), "verifiers")
    assert "-r system/agents/verifiers/requirements.txt" in installs
    needs = (ROOT / "system/agents/verifiers/requirements.txt").read_text().splitlines()
    assert "verifiers==0.4.0" in needs
    assert all("==" in line for line in needs if not line.startswith("#"))


def test_make_docs_installs_mkdocs_once_and_builds_strictly(tmp_path: Path) -> None:
    """Without the project itself, whose libraries no page needs."""
    machine = Machine(tmp_path)
    installs = installed_once(machine, "docs")
    assert "-e" not in installs.split()
    assert ".venv-docs/bin -m mkdocs build --strict" in machine.calls.read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert all("==" in need for need in extras["docs"])
    assert not set(extras["docs"]) & set(extras["dev"])


def test_make_bench_trl_installs_its_pins_once_into_an_environment_of_its_own(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    code, said, installs = machine.make("bench-trl")
    assert code == 0, said
    assert ".venv-trl/bin -m pip install" in installs
    assert "-r system/bench/trl-requirements.txt" in installs
    needs = (ROOT / "system/bench/trl-requirements.txt").read_text().splitlines()
    pins = [line for line in needs if not line.startswith("#")]
    assert "trl==1.16.0" in pins
    assert all("==" in line for line in pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    both = {
        name: [pin for pin in (*pins, *project) if pin.startswith(f"{name}==")]
        for name in ("torch", "transformers")
    }
    assert all(len(set(found)) == 1 < len(found) for found in both.values())  # one release on both sides
    assert machine.make("bench-trl")[2] == ""


def recipe(name: str) -> str:
    """Without comments."""
    return re.sub(r"^#.*\n", "", (CONTAINER / name).read_text(), flags=re.MULTILINE)


RECIPES = ("Dockerfile", "espalier.def")


@pytest.mark.parametrize("name", RECIPES)
def test_a_container_has_the_versions_of_the_checkout_and_no_others(name: str) -> None:
    text = recipe(name)
    assert "make gpu" in text
    assert "==" not in text
    assert "pip install" not in text  # so that all pins are those that `make gpu` reads
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (cuda, system) = re.findall(r"nvidia/cuda:(\d+)[\d.]*-devel-ubuntu([\d.]+)", text)[0]
    assert f"nvidia-nccl-cu{cuda}==" in (NEEDS / "requirements-nccl.txt").read_text()
    assert all(f"[cu{cuda}]" in need for need in project["project"]["optional-dependencies"]["gpu"])
    assert float(system) >= 22.04  # glibc 2.35, Python 3.10; 24.04 has 3.12
    assert project["project"]["requires-python"] == ">=3.11"
    assert float(system) >= 24.04
    for needed in ("gcc", "python3-dev", "python3-venv", "make"):
        assert re.search(rf"\b{needed}\b", text), needed


@pytest.mark.parametrize("name", RECIPES)
def test_a_container_gets_all_that_is_installed(name: str) -> None:
    copied = {word for line in recipe(name).splitlines() if "/opt/espalier/" in line for word in line.split()}
    copied = {word for word in copied if (ROOT / word).exists() and not word.startswith("/")}
    assert {
        "Makefile",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "system",
        "actors",
        "slurm",
    } <= copied
    assert "PATH=/opt/espalier/.venv/bin:$PATH" in recipe(name)


def test_both_container_recipes_make_the_same_image() -> None:
    def essence(text: str) -> list[str]:
        packages = re.search(r"no-install-recommends((?:\s|\\|[\w.+-])+)&&", text)
        assert packages
        base = re.search(r"nvidia/cuda:\S+", text)
        assert base
        return [
            base[0],
            *packages[1].replace("\\", " ").split(),
            *re.findall(r"cd /opt/espalier && .*", text),
        ]

    first, second = (essence(recipe(name)) for name in RECIPES)
    assert first == second
    assert len(first) > 8
