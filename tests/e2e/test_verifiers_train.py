"""A run that trains an environment of the real verifiers: the one of examples/."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from example_runs import trained

from system.agents.verifiers.command import interpreter
from system.config import ConfigError
from system.tree.record import Kind, validate
from system.tree.store import read_trees


@pytest.mark.verifiers
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_environment_of_verifiers_is_trained_as_it_is(tmp_path: Path) -> None:
    try:
        interpreter("")
    except ConfigError as error:
        missing = pytest.fail if os.environ.get("ESPALIER_REQUIRE_VERIFIERS") else pytest.skip
        missing(f"verifiers is not installed: {error}")
    words = (
        "run.steps=1",
        "agent.concurrency=4",
        "rollout.leaves=4",
        "flow.batch_leaves=8",
        "warmstart.steps=100",
        "warmstart.demos=512",
        "eval.questions=2",
    )
    summary = trained("verifiers_search.yaml", tmp_path, *words)
    assert (summary["versions"], summary["eval"]["after"]["questions"]) == (1, 2)
    agent = summary["agent"]
    assert agent["episodes"] >= summary["leaves"] + 2 * 2
    assert agent["failed"] == agent["late"] == agent["rewrites"] == agent["retries"] == 0
    assert summary["mismatch"]["engine_logprob_diff_max"] < 1e-3  # nothing was tokenised again
    trees = list(read_trees(tmp_path / "mine" / "trees"))
    assert trees
    for tree in trees:
        validate(tree)
        assert Kind.MODEL in tree.kind
        assert {"agent/right", "agent/tidy", "agent/calls"} <= set(tree.meta["measured"])
    records = [json.loads(line) for line in (tmp_path / "mine" / "metrics.jsonl").read_text().splitlines()]
    assert any("reward/agent/right" in record for record in records)
