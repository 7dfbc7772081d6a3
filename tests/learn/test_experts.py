"""Mixtures of experts under expert parallelism: what Hugging Face computes, in every layout of two ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from learner_ranks import Ranks
from test_families import assert_equal, family_case

LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": {"dp": 2, "ep": 2},
    "ep2 full": {"dp": 2, "ep": 2, "recompute": "full"},
    "ep2 selective": {"dp": 2, "ep": 2, "recompute": "selective"},
    "ep2 with tp2": {"tp": 2, "ep": 2, "sequence_parallel": True},
    "ep2 with cp2": {"cp": 2, "ep": 2, "recompute": "selective"},
    "dp2": {"dp": 2},
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("tied", [False, True])
def test_experts_equal_hugging_face(
    ranks: Ranks, tiny_model: Callable[..., str], tied: bool, layout: str
) -> None:
    """Tied: with a dense layer, and weights of the chosen experts that do not add up to 1."""
    model = tiny_model("qwen3_moe", tied=tied)
    assert_equal(ranks.run(family_case, world=2, model=model, layout=LAYOUTS[layout]), model)
