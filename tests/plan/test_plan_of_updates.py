"""What the plan says of an update of the weights: of all of them, and of adapters alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from system.config import LearnConfig, LoraConfig, load
from system.models.known import KNOWN
from system.plan import plan, text
from system.plan.hardware import GPUS
from system.plan.memory import EngineLayout
from system.plan.speed import PublishRoofline

RECIPE = str(Path(__file__).parents[2] / "configs" / "qwen3-32b-lora-1x8.yaml")


def test_adapters_that_travel_alone_stop_no_engine() -> None:
    """What merged weights take in the pause, adapters take beside running requests."""
    learn = LearnConfig(tp=4, lora=LoraConfig(rank=16))
    merged, alone = (
        PublishRoofline(KNOWN["qwen3-32b"], learn, EngineLayout(tp=4), GPUS["h100"], adapters=apart)
        for apart in (False, True)
    )
    assert merged.pause_s > 2
    assert alone.pause_s == 0
    assert GPUS["h100"].swap_s < alone.stage_s < merged.stage_s
    assert alone.size < merged.size / 100


@pytest.mark.parametrize("kv", ["recompute", "keep"])
def test_a_plan_by_lora_tells_of_no_pause_and_of_contexts_that_are_computed_again(kv: str) -> None:
    """A later turn takes nothing from the cache of another version, whatever ``engine.kv_after_update``."""
    settings = f"engine.kv_after_update={kv}"
    alone = plan(load(RECIPE, [settings, "learn.lora.sync=adapter"]))
    assert alone.forecast.pause_s == 0
    assert alone.forecast.refill_s > 0
    assert "no engine pauses; contexts computed again under new adapters, turn by turn: " in text(alone)
    merged = plan(load(RECIPE, [settings, "learn.lora.sync=merged"]))
    assert merged.forecast.pause_s > 2
    assert (merged.forecast.refill_s > 0) == (kv == "recompute")
    assert "engines pause 2" in text(merged)
    assert merged.forecast.engines_s > alone.forecast.engines_s or kv == "keep"


@pytest.mark.parametrize(
    ("settings", "copied"),
    [
        (["learn.lora.sync=merged"], True),
        (["learn.lora.rank=0"], True),
        (["learn.lora.sync=merged", "engine.weights=disk", "engine.weights_dir=there"], False),
        (["learn.lora.sync=merged", "engine.name=embedded"], False),
        (["learn.lora.sync=adapter"], False),
    ],
)
def test_the_first_rank_has_room_for_the_weights_on_their_way(settings: list[str], copied: bool) -> None:
    made = plan(load(RECIPE, settings))
    told = "61.0 GiB more at rank 0, on its GPU or host: weights to send"
    assert (told in text(made)) == copied
