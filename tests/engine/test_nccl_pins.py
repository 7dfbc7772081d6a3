"""One NCCL in both environments: what is asked for, and what is installed, from files of this machine."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest

from system.engine.sglang.command import CHECKOUT

REQUIREMENTS = CHECKOUT / "system" / "engine" / "sglang"
_PIN = re.compile(r"^nvidia-nccl-cu\d+==([\d.]+)", re.MULTILINE)


def wanted() -> str:
    (version,) = _PIN.findall((REQUIREMENTS / "requirements-nccl.txt").read_text())
    return version


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_both_environments_install_the_same_nccl() -> None:
    done = subprocess.run(
        ["make", "-n", "-B", "PYTHON=true", "install", "sglang"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    steps = done.stdout.replace("\\\n", " ").splitlines()
    asking = [line for line in steps if "requirements-nccl.txt" in line]
    assert len(asking) == 2
    for line, venv in zip(asking, (".venv/", ".venv-sglang/"), strict=True):
        installs = [step for step in re.split("&&|;|then", line) if "requirements-nccl.txt" in step]
        assert len(installs) == 1
        assert f"{venv}bin/python -m pip install" in installs[0]
        assert "--no-deps" in installs[0], "pip would otherwise insist on torch's own pin"
    # Last: a later step of pip could bring another one.
    assert asking[1].rfind("requirements-nccl") > asking[1].rfind("requirements-gpu")


@pytest.mark.parametrize("environment", [".venv", ".venv-sglang"])
def test_installed_torch_and_nccl_agree_with_the_pin(environment: str) -> None:
    """A CUDA build of torch names the NCCL it was built for: ours must be no older.  CPU builds have none."""
    packages = [*map(str, (CHECKOUT / environment).glob("lib/python3*/site-packages"))]
    if not packages:
        pytest.skip(f"there is no {environment}")
    found = {one.metadata["Name"].lower(): one for one in importlib.metadata.distributions(path=packages)}
    asked = _PIN.findall("\n".join(need.replace(" ", "") for need in found["torch"].requires or ()))
    installed = [one.version for name, one in found.items() if name.startswith("nvidia-nccl")]
    for pin in asked:
        assert number(wanted()) >= number(pin)
        assert installed == [wanted()]
    if not asked:
        assert "+cpu" in found["torch"].version or not installed


def test_the_pin_is_one_that_both_files_leave_room_for() -> None:
    """Neither environment asks for another NCCL by name."""
    for file in [*REQUIREMENTS.glob("requirements-*.txt"), CHECKOUT / "pyproject.toml"]:
        others = [line for line in Path(file).read_text().splitlines() if re.match(r'\s*"?nvidia-nccl', line)]
        assert others == ([f"nvidia-nccl-cu13=={wanted()}"] if file.name == "requirements-nccl.txt" else [])
