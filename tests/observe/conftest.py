"""A tree, a configuration and a run directory to put things in."""

from __future__ import annotations

from pathlib import Path

import pytest
from observe_trees import make_tree

from system.config import Config
from system.observe.rundir import RunDir
from system.tree.record import Tree


@pytest.fixture
def tree() -> Tree:
    return make_tree()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config()
    config.run.dir = str(tmp_path / "runs")
    return config


@pytest.fixture
def run_dir(config: Config) -> RunDir:
    return RunDir.create(config, "demo")
