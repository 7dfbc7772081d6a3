"""Models with random weights: speed does not ask what a model knows."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM

from system.config import ModelConfig
from system.tasks.tiny_model import qwen3_config


def random_qwen3(path: Path, shape: ModelConfig, vocab: int, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 of ``shape`` with random float32 weights, saved to ``path`` in Hugging Face format."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(qwen3_config(shape, vocab, eos_token_id=0))
    model.save_pretrained(path)
    return model.eval()
