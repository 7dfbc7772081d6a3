"""Qwen3's mixtures of experts (30B-A3B, 235B-A22B): Qwen3 with sparse layers."""

from system.models.families.base import ModelFamily

FAMILY = ModelFamily(
    name="qwen3_moe",
    title="Qwen3-MoE",
    qk_norm=True,
    experts=True,
    kv_heads=4,
    window=4096,
    window_switch="use_sliding_window",
    refused={
        "attention_bias": "a bias of the output projection is not computed here, and Qwen's models have none"
    },
)
