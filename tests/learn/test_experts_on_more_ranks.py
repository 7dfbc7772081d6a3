"""Mixtures of experts on more data-parallel ranks than experts are spread over.

Each expert is then held by several of them: its gradient is the sum over those alone, and that of all else
over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from learner_ranks import Ranks
from test_families import assert_equal, family_case
from test_learner_equality import adamw_case
from test_lora import ATTENTION, assert_equals_peft, lora_case, started

from system.config import PartConfig

DP4: dict[str, Any] = {"dp": 4, "ep": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4, ep2": DP4,
    "dp4, ep2, split": DP4 | {"distributed_optimizer": True},
    "dp2, tp2, ep2": {"dp": 2, "tp": 2, "sequence_parallel": True, "ep": 2},
}


@pytest.mark.parametrize("layout", ["dp4, ep2", "dp2, tp2, ep2"])
def test_gradients_are_hugging_face_s(ranks: Ranks, tiny_model: Callable[..., str], layout: str) -> None:
    model = tiny_model("qwen3_moe")
    assert_equal(ranks.run(family_case, world=4, model=model, layout=LAYOUTS[layout]), model)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_clipped_steps_are_adamw_s(ranks: Ranks, tiny_model: Callable[..., str], layout: str) -> None:
    """With fewer rows than ranks in some of them."""
    case = {"model": tiny_model("qwen3_moe", tied=True), "correction": PartConfig("none"), "offload": False}
    for result in ranks.run(adamw_case, world=4, **case, **LAYOUTS[layout]):
        assert result["moved"] > 2e-3
        assert result["error"] < 1e-2 * result["moved"] / 3
        assert result["steps"] == 3
        assert result["nll error"] < 1e-5
        assert result["skipped"] == 0


@pytest.mark.parametrize("layout", ["dp4, ep2", "dp2, tp2, ep2"])
def test_adapters_learn_as_by_peft_beside_them(
    ranks: Ranks, tiny_model: Callable[..., str], tmp_path_factory: pytest.TempPathFactory, layout: str
) -> None:
    model = tiny_model("qwen3_moe", tied=True)
    expected, init = started(tmp_path_factory, model, ATTENTION)
    case = {"model": model, "layout": LAYOUTS[layout], "targets": ATTENTION, "init": init}
    assert_equals_peft(ranks.run(lora_case, world=4, **case), expected)
