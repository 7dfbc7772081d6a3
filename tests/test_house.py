"""The rules of the house hold, and each of them can fail: here are planted things that break them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from house import MOST_LINES, broken_rules

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkout to plant things in."""
    for package in ("system", "actors", "examples"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def plant(root: Path, name: str, text: str) -> None:
    """Append ``text`` to the file ``name``, or make it."""
    with (root / name).open("a", encoding="utf-8") as file:
        file.write("\n\n" + text)


def import_linter(root: Path) -> tuple[int, str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(
        command, cwd=root, env={"COLUMNS": "200"}, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


def test_the_house_is_in_order() -> None:
    assert broken_rules(ROOT) == []
    assert import_linter(ROOT)[0] == 0


def test_the_architecture_shows_the_floors_that_are_enforced() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (floors,) = (c["layers"] for c in settings["tool"]["importlinter"]["contracts"] if c["id"] == "floors")
    lines = (ROOT / "docs" / "architecture.md").read_text().splitlines()
    shown = [line.split("  ")[0] for line in lines if "   " in line and re.match("[a-z]+ [| a-z]*  ", line)]
    assert shown == [floor.replace("(", "").replace(")", "") for floor in floors]


def test_imports_that_climb_cross_or_turn_in_a_circle_are_found(copy: Path) -> None:
    plant(copy, "system/tree/record.py", "from system.learn import credit  # upward\n")
    plant(
        copy, "system/tasks/jsonl.py", "def late():\n    from actors import train  # not at the top either\n"
    )
    plant(copy, "system/observe/show.py", "import ray\n")
    plant(copy, "system/tools/breaker.py", "import system.tools.service  # which imports breaker\n")
    plant(copy, "system/flow/admission.py", "import torch\n")
    code, said = import_linter(copy)
    assert code == 1
    for planted in (
        "system.tree is not allowed to import system.learn",
        "system is not allowed to import actors",
        "system.tasks.jsonl -> actors.train",
        "system is not allowed to import ray",
        "No cycles are allowed in system.tools",
        "system.flow is not allowed to import torch",
    ):
        assert planted in said, said
    assert "0 kept" in said, "each contract is broken by one of these"


def test_everything_else_is_found(copy: Path) -> None:
    plant(copy, "system/flow/idle.py", "def never_called():\n    return 1\n")
    plant(copy, "system/flow/ledger.py", "import importlib\nimportlib.import_module('actors.train')\n")
    plant(copy, "system/observe/show.py", "def load(name):\n    return __import__(name)\n\n\nload('x')\n")
    plant(copy, "system/tools/breaker.py", "class _Actor:\n    pass\n\n\n_Actor()\n")
    plant(copy, "actors/long.py", "# a line\n" * MOST_LINES)
    plant(copy, "system/watch/static/long.js", "// a line\n" * MOST_LINES)
    found = "\n".join(broken_rules(copy))
    for planted in (
        "system/flow/idle.py:",
        "unused function 'never_called'".replace("'", ""),
        "imports actors.train: system never imports actors or ray",
        "imports a module whose name is not written there",
        "class _Actor stands in system/flow/idle.py:",
        f"actors/long.py: {MOST_LINES + 2} lines",
        "system/watch/static/long.js: ",
    ):
        assert planted in found, found
    assert len(found.splitlines()) == 6, found


def test_tests_of_several_directories_can_be_collected_together() -> None:
    """Which conftest.py ``import conftest`` finds depends on what was collected before."""
    tests = (ROOT / "tests").rglob("*.py")
    assert not [path for path in tests if re.search(r"^(from|import) conftest\b", path.read_text(), re.M)]
