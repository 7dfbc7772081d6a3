from __future__ import annotations

import json
from pathlib import Path

import pytest

from system.bench.gpu import run
from system.bench.shard import TOY, grown
from system.errors import ConfigError
from system.tree.record import validate


def test_probes_run_at_toy_size_without_a_gpu(tmp_path: Path) -> None:
    run(tmp_path, ["attention", "loss", "learner-selective"], quick=True)
    written = json.loads((tmp_path / "gpu.json").read_text())["probes"]
    assert list(written) == ["attention", "loss", "learner-selective"]
    assert all("error" not in figures for figures in written.values()), written
    assert written["learner-selective"]["tokens_per_s"] > 0
    assert len(written["attention"]["masks"]) == 4
    assert (tmp_path / "gpu.html").stat().st_size > 0


def test_an_unknown_probe_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kernels.*attention"):
        run(tmp_path, ["kernels"])


def test_a_tree_fills_its_row() -> None:
    tree = grown(TOY, 0)
    validate(tree)
    assert tree.n_tokens == TOY.tokens
    assert tree.n_leaves == TOY.leaves
