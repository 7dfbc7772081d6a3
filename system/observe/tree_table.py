"""The newest trees of a run as rows of a table, for a view that shows tables."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from rich.console import Console

from system.config import Config
from system.observe.outline import Decode, outline
from system.observe.rundir import RunDir
from system.observe.show import decoder, view
from system.redact import redact
from system.tree.record import Tree
from system.tree.stats import TreeStats
from system.tree.store import newest_trees

COLUMNS = (
    "prompt",
    "task",
    "version",
    "leaves",
    "forks",
    "tool calls",
    "tokens",
    "reward",
    "rewards",
    "outline",
)
_WIDTH = 100_000  # columns of an outline: a secret that is wrapped is not known as one


def newest_rows(run_dir: RunDir, config: Config, most: int) -> list[list[Any]]:
    """A row of :data:`COLUMNS` for each of the newest ``most`` trees that the run directory keeps.

    The text is that of ``espalier tree``, without secrets.
    """
    trees = newest_trees(run_dir.trees, most)
    if not trees:
        return []
    decode = decoder(run_dir, config)
    return [_row(tree, run_dir, config, decode) for tree in trees]


def _row(tree: Tree, run_dir: RunDir, config: Config, decode: Decode) -> list[Any]:
    stats, page = TreeStats.of(tree), io.StringIO()
    shown = outline(tree, view(run_dir, config, tree, decode=decode))
    Console(file=page, width=_WIDTH, highlight=False).print(shown)
    rewards = stats.rewards
    return [
        *(redact(stats.prompt_id), redact(stats.task), int(stats.version_max), stats.leaves, stats.forks),
        *(len(stats.calls), int(stats.generated), float(np.mean(rewards)) if rewards.size else None),
        " ".join(f"{reward:.3g}" for reward in rewards.tolist()),
        str(redact(page.getvalue())),
    ]
