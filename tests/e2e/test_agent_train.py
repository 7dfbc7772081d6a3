"""A run that trains an agent which knows nothing of it: a program per episode, with OpenAI's client."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from example_runs import EXAMPLES, trained

from system.tree.record import Kind, Outcome, validate
from system.tree.store import read_trees


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_program_is_trained_unchanged(tmp_path: Path) -> None:
    words = (
        "agent.run=",
        f"agent.command=python {EXAMPLES / 'search_agent.py'} {{question}}",
        "agent.concurrency=4",
        "agent.deadline_s=300",  # each is a program, which a busy machine starts slowly
        "run.steps=2",
        "rollout.leaves=4",
        "flow.batch_leaves=8",
        "warmstart.steps=150",
        "eval.questions=3",
    )
    summary = trained("search_agent.yaml", tmp_path, *words)
    assert summary["versions"] == 2
    assert summary["eval"]["after"]["questions"] == 3
    assert not summary["causes"]
    agent = summary["agent"]
    assert agent["episodes"] >= summary["leaves"] + 2 * 3  # and those of groups that nobody waited for
    assert agent["turns"] >= agent["episodes"]
    assert agent["failed"] == agent["rewrites"] == 0
    # What the learner computes of the very weights that sampled is what the engine said: nothing was
    # tokenised again on the way through somebody else's client.
    assert summary["mismatch"]["engine_logprob_diff_max"] < 1e-3
    trees = list(read_trees(tmp_path / "mine" / "trees"))
    assert len(trees) >= 4
    for tree in trees:
        validate(tree)
        assert np.unique(tree.episode).tolist() == [0, 1, 2, 3]
        assert set(tree.outcome.tolist()) <= {Outcome.ENDED, Outcome.LENGTH, Outcome.TURN_LIMIT}
        assert Kind.TOOL in tree.kind
        assert {call.tool for call in tree.calls} <= {"search", "python"}
        assert len(tree.meta["agents"]) == 4
    records = [json.loads(line) for line in (tmp_path / "mine" / "metrics.jsonl").read_text().splitlines()]
    assert any(record.get("agent/turns", 0) > 0 for record in records)
