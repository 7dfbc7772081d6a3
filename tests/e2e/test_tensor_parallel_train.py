"""A whole small run with a learner of two ranks, and the memory that it tells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from system.config import load
from system.observe.jsonl import read_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_recipe_of_two_ranks_differs_from_the_quickstart_in_nothing_else() -> None:
    one, two = load(CONFIGS / "quickstart.yaml"), load(CONFIGS / "quickstart-tp2.yaml")
    assert (one.learn.tp, two.learn.tp) == (1, 2)
    two.learn.tp = 1
    assert one == two


def test_two_ranks_compute_what_the_engine_sampled(start: Callable[..., Any]) -> None:
    run = start("run.steps=2", recipe="configs/quickstart-tp2.yaml")
    assert run.wait(600.0) == 0, run.output()
    assert {"learner-0.log", "learner-1.log"} <= {one.name for one in (run.directory / "logs").iterdir()}
    records = [*read_jsonl(run.directory / "metrics.jsonl")]
    steps = [record for record in records if "train/loss" in record]
    assert [record["step"] for record in steps] == [1, 2]
    assert steps[0]["train/mismatch_kl"] < 1e-3
    summary = run.summary()
    assert (summary["versions"], summary["config"]["learn"]["tp"]) == (2, 2)
    used = [record["memory/pss_bytes"] / 1e6 for record in records if "memory/pss_bytes" in record]
    most = summary["memory"]["pss_mb_max"]
    assert 300 < most < 10_000
    assert all(one <= most for one in used)
    assert f"at most {most:.0f} MB" in run.output()
