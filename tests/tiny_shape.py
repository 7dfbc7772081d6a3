"""The smallest model that tests write themselves, tensor by tensor."""

from __future__ import annotations

from typing import Any


def tiny_shape(vocab: int) -> dict[str, Any]:
    """Its ``config.json``: two layers of a Qwen3 over ``vocab`` tokens."""
    return {
        "model_type": "qwen3",
        "vocab_size": vocab,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 8,
        "tie_word_embeddings": True,
    }
