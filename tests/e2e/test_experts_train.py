"""A whole small run of a mixture of experts: embedded engine, routing replay, expert parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from system.observe.jsonl import read_jsonl
from system.tree.record import validate
from system.tree.routes import recorded
from system.tree.store import read_trees

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_run_replays_the_experts_of_its_engine(start: Callable[..., Any]) -> None:
    """In rounds, so that no branch has tokens of two versions: those behind an update would be sampled with
    the keys of other experts than those before it were.
    """
    run = start(
        "run.steps=3",
        "flow.staleness=0",
        "model.family=qwen3_moe",
        "learn.tp=2",
        "learn.sequence_parallel=true",
        "learn.ep=2",
    )
    assert run.wait(400.0) == 0, run.output()
    trees = list(read_trees(run.directory / "trees"))
    assert len(trees) > 6
    for tree in trees:
        validate(tree)
        assert tree.routes.shape == (tree.n_tokens, 2, 2)
        assert tree.routes.dtype == np.uint8
        missing = np.flatnonzero(~recorded(tree.routes))
        assert set(missing.tolist()) <= {int(tree.end[node]) - 1 for node in tree.leaf.tolist()}
    steps = [record for record in read_jsonl(run.directory / "metrics.jsonl") if "train/loss" in record]
    assert len(steps) == 3
    for step in steps:
        assert 0.9 < step["train/routes_replayed"] < 1, "all but what each branch ends with"
        assert step["train/engine_kl"] < 1e-8
    assert steps[0]["train/routes_changed"] < 1e-3, "the very weights that sampled"
