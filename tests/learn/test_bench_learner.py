from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learner_ranks import Place, Ranks

from system.bench.learner import PATH_TOKENS, Case, grown, run
from system.tree.pack import flatten
from system.tree.record import validate


@pytest.mark.parametrize("case", [Case(0.1, 4), Case(0.8, 16)])
def test_bench_trees_share_what_they_claim(case: Case) -> None:
    tree = grown(case, np.random.default_rng(0))
    validate(tree)
    paths = flatten(tree)
    assert [p.n_tokens for p in paths] == [PATH_TOKENS] * case.leaves
    shared = round(case.prefix * PATH_TOKENS)
    assert tree.n_tokens == shared + case.leaves * (PATH_TOKENS - shared)


def bench_case(place: Place, out: str) -> dict[str, Any]:
    return run(Path(out), quick=True)


def test_bench_writes_its_report(ranks: Ranks, tmp_path: Path) -> None:
    (report,) = ranks.run(bench_case, world=1, out=str(tmp_path))
    written = json.loads((tmp_path / "learner.json").read_text())
    assert {key: written[key] for key in report} == report
    assert (tmp_path / "learner.html").stat().st_size > 0
    assert (tmp_path / "learner.png").stat().st_size > 0
    for result in report["results"]:
        assert result["logprob_error"] < 1e-4  # both sides compute the same thing
        assert result["speedup"] > 0
        assert result["ideal"] == pytest.approx(result["flat_tokens"] / result["tree_tokens"])
