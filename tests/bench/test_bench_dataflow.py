from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from system.bench.dataflow import LEAVES, RANKS, grown, run
from system.tree.pack import flatten
from system.tree.record import validate


def test_bench_trees_are_what_they_claim() -> None:
    tree = grown(0, np.random.default_rng(0))
    validate(tree)
    assert [path.n_tokens for path in flatten(tree)] == [6000] * LEAVES
    assert tree.n_tokens < 0.8 * 6000 * LEAVES


def test_a_rank_fetches_and_packs_its_share_only(tmp_path: Path) -> None:
    report = run(tmp_path, quick=True)
    written = json.loads((tmp_path / "dataflow.json").read_text())
    assert {key: written[key] for key in report} == json.loads(json.dumps(report))
    *_, before, after = report["costs"]  # rows that hold whole trees
    assert after["driver_mb"] < before["driver_mb"] / 10
    assert after["fetched_mb"][1] < before["fetched_mb"][0] / (RANKS / 2)
    assert after["pack_s"][1] < before["pack_s"][0]
