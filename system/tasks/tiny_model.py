"""A new, tiny model for a task that brings its own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from system.config import ModelConfig
from system.models.families import family_of

MAX_POSITIONS = 4096
ROPE_THETA = 10_000.0
USUAL = 0.02  # standard deviation of new matrices, as nearly everywhere


def create_model(path: Path, tokenizer: PreTrainedTokenizerBase, config: ModelConfig, seed: int) -> None:
    """Write a Hugging Face directory: config, weights, generation config and tokenizer.

    Same ``seed``, same weights.  Two choices make a small model learn to copy (names, numbers, results)
    within some hundred steps of a warm start, and a third keeps those that have no norm of queries and keys
    from learning it more slowly:

    * tied embeddings: once attention finds the token to copy, its embedding already is its output vector,
      also for a token that was seldom trained;
    * every matrix, embeddings included, is drawn with standard deviation ``hidden_size ** -0.5`` (0.1 at the
      default width) in place of the usual 0.02, which keeps activations near unit scale at this width and
      leaves no long plateau before the first attention patterns form;
    * queries and keys are drawn with the usual 0.02 where no norm bounds them: attention begins soft.  With
      as much as the rest, a Llama's loss stays four times as high after the quickstart's 300 steps.

    Raises ValueError when the tokenizer has no EOS or padding token.
    """
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if not isinstance(eos, int) or not isinstance(pad, int):
        raise ValueError("the tokenizer of a new model needs an EOS and a padding token")
    shape = tiny_config(config, len(tokenizer), bos_token_id=None, eos_token_id=eos, pad_token_id=pad)
    soft_attention = not family_of(config.family).qk_norm
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:  # the norms' weights stay at 1
                    soft = soft_attention and name.endswith(("q_proj.weight", "k_proj.weight"))
                    parameter.normal_(0.0, USUAL if soft else config.hidden_size**-0.5)
    model.to(getattr(torch, config.dtype))
    model.generation_config = GenerationConfig(bos_token_id=None, eos_token_id=eos, pad_token_id=pad)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(str(path))


def tiny_config(config: ModelConfig, vocab: int, **tokens: Any) -> PreTrainedConfig:
    """``config``'s family, shape and dtype, with tied embeddings.  ``tokens``: ids of special tokens."""
    family = family_of(config.family)
    own: dict[str, Any] = {"sliding_window": None} if family.window and not family.window_switch else {}
    if family.experts:
        own |= {
            "num_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
            "moe_intermediate_size": config.expert_size,
            "norm_topk_prob": True,
        }
    return AutoConfig.for_model(
        family.name,
        vocab_size=vocab,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.hidden_size // config.heads,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        dtype=config.dtype,
        **own,
        **tokens,
    )
