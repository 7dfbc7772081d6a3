"""Models with random weights: speed does not ask what a model knows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from system.config import ModelConfig

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM


def random_qwen3(path: Path, shape: ModelConfig, vocab: int, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 of ``shape`` with random float32 weights, saved to ``path`` in Hugging Face format."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.hidden_size // shape.heads,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            eos_token_id=0,
        )
    )
    model.save_pretrained(path)
    return model.eval()
