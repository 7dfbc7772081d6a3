"""What a run says last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from system.observe.rundir import RunDir


def report(summary: Mapping[str, Any], run_dir: RunDir) -> list[str]:
    """The lines for the console; ``summary`` is what ``summary.json`` holds."""
    tokens = summary["tokens"]
    lines = [
        f"held-out questions, {which} training: accuracy {scores['accuracy']:.3f}, "
        f"reward {scores['reward']:.3f}, {scores['tool_calls']:.2f} tool calls per question"
        for which, scores in summary["eval"].items()
    ]
    sharing = tokens["flat_trained"] / max(tokens["unique_trained"], 1)
    return [
        *lines,
        f"{summary['trees']} trees, {summary['leaves']} leaves, {summary['forks']} forks, "
        f"{tokens['generated']} tokens generated, {tokens['trained']} trained on, "
        f"{sharing:.2f} flat tokens per packed one, {summary['wall_s']:.0f} s",
        f"see {run_dir.summary_path}, {run_dir.curves}/overview.png, and: espalier tree {run_dir.root}",
    ]
