"""A run that trains an agent which knows nothing of it: a program per episode, with OpenAI's client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from summary_keys import unexplained

from system.tree.record import Kind, Outcome, validate
from system.tree.store import read_trees

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_program_is_trained_unchanged(tmp_path: Path) -> None:
    words = (
        "agent.run=",
        f"agent.command=python {EXAMPLES / 'search_agent.py'} {{question}}",
        "agent.concurrency=4",
        "agent.deadline_s=300",  # each is a program, which a busy machine starts slowly
        f"run.dir={tmp_path}",
        "run.name=mine",
        "run.steps=2",
        "rollout.leaves=4",
        "flow.batch_leaves=8",
        "warmstart.steps=150",
        "eval.questions=3",
        "observe.wandb=disabled",
    )
    done = subprocess.run(
        [sys.executable, "-m", "actors.cli.main", "train", "search_agent.yaml", *words],
        cwd=EXAMPLES,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "mine" / "summary.json").read_text())
    assert not unexplained(summary)
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
