"""Which way adapters go to the engines by ``learn.lora.sync``, and what is told of what rounding loses."""

from __future__ import annotations

import pytest

from system.config import ConfigError, load
from system.config.lora import adapters_travel, merging_warning
from system.config.schema_lora import MODULES, PARTS, LoraConfig
from system.models.families.base import NAMES

LORA = ["model.path=m", "learn.lora.rank=8"]
BF16 = [*LORA, "engine=sglang", "model.dtype=bfloat16"]


@pytest.mark.parametrize(
    ("words", "travel"),
    [
        (LORA, True),
        ([*LORA, "learn.lora.sync=merged"], False),
        (["model.path=m"], False),
        (BF16, True),
        ([*BF16, "learn.lora.sync=merged"], False),
        ([*BF16, "model.dtype=float32"], False),
        ([*BF16, "model.dtype=float32", "learn.lora.sync=adapter"], True),
        ([*BF16, "engine.sglang={max_loras_per_batch: 4}"], True),
        ([*BF16, "engine.urls=[http://a:1]"], False),
        ([*BF16, "engine.urls=[http://a:1]", "learn.lora.sync=adapter"], True),
        ([*BF16, "engine.weights=distributed"], False),
        ([*BF16, "engine.device=cpu"], False),
        ([*BF16, "engine.sglang={quantization: fp8, load_format: flash_rl}"], False),
        ([*BF16, "engine.sglang={speculative_algorithm: NGRAM}"], False),
    ],
)
def test_what_travels(words: list[str], travel: bool) -> None:
    assert adapters_travel(load(None, words)) is travel


def test_what_is_told_of_merging_in_few_bits() -> None:
    attached = load(None, [*BF16, "engine.urls=[http://a:1]"])
    told = merging_warning(attached, 0.2433)
    assert "keep 24% of what the adapters change" in told
    assert "set learn.lora.sync=adapter, or model.dtype=float32; auto merges because of engine.urls" in told
    assert "because" not in merging_warning(load(None, [*BF16, "learn.lora.sync=merged"]), 0.2433)
    assert merging_warning(attached, 0.995) == ""


def test_what_is_kept_of_an_update_is_asked_of_merged_weights_alone() -> None:
    """``engine.kv_after_update`` decides nothing where a request keeps its version."""
    keep = [*BF16, "rollout.rescore=true", "engine.kv_after_update=keep"]
    load(None, keep)
    with pytest.raises(ConfigError, match=r"rollout\.rescore=true needs engine\.kv_after_update=recompute"):
        load(None, [*keep, "learn.lora.sync=merged"])


def test_projections_are_called_as_in_a_models_files() -> None:
    assert {*MODULES} == {*PARTS.values()}
    for part, module in MODULES.items():
        assert NAMES[part].split(".")[-2] == module


def test_a_mixture_of_experts_has_adapters_where_every_token_goes_through() -> None:
    attention = ("q", "k", "v", "out")
    assert LoraConfig().parts(experts=False) == (*attention, "gate", "up", "down")
    assert LoraConfig().parts(experts=True) == attention
    for experts in (False, True):
        assert LoraConfig(targets=["o", "q"]).parts(experts=experts) == ("q", "out")
