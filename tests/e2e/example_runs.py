"""An example, trained as its reader would: in its directory, by its recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from summary_keys import unexplained

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def trained(recipe: str, runs: Path, *words: str) -> dict[str, Any]:
    """The summary of the run ``mine`` in ``runs``, every key of which is explained."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "actors.cli.main", "train", recipe, *words),
            *(f"run.dir={runs}", "run.name=mine", "observe.wandb=disabled"),
        ],
        cwd=EXAMPLES,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary: dict[str, Any] = json.loads((runs / "mine" / "summary.json").read_text())
    assert not unexplained(summary)
    return summary
