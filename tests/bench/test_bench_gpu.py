from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from system.bench.gpu import run
from system.bench.random_model import forked_tree
from system.bench.shard import attended_pairs
from system.errors import ConfigError
from system.tree.record import path, token_node, validate
from system.tree.stats import TreeStats


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


def test_pairs_that_may_attend_are_counted_in_a_forked_tree() -> None:
    tree = forked_tree(5, 3, 2, 100, np.random.default_rng(0))
    validate(tree)
    assert (tree.n_tokens, tree.n_leaves) == (5 + 2 * 3, 2)
    node = token_node(tree)
    pairs = sum(int(np.isin(node[: i + 1], path(tree.parent, node[i])).sum()) for i in range(tree.n_tokens))
    assert attended_pairs(TreeStats.of(tree)) == pairs == 15 + 2 * (3 * 5 + 6)
