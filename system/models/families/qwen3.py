"""Qwen3, dense."""

from system.models.families.base import ModelFamily

FAMILY = ModelFamily(
    name="qwen3",
    title="Qwen3",
    qk_norm=True,
    kv_heads=32,
    head_dim=128,
    window=4096,
    window_switch="use_sliding_window",
    refused={
        "attention_bias": "a bias of the output projection is not computed here, and Qwen's models have none"
    },
)
