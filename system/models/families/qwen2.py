"""Qwen2 and Qwen2.5, dense."""

from system.models.families.base import ModelFamily

FAMILY = ModelFamily(
    name="qwen2",
    title="Qwen2, Qwen2.5",
    qkv_bias=True,
    kv_heads=32,
    window=4096,
    window_switch="use_sliding_window",
    refused={
        "dual_chunk_attention_config": "attention by chunks (Qwen2.5-1M) is not computed here; without this "
        "key the model is exact up to 262,144 tokens"
    },
)
