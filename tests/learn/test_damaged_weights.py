"""A learner does not start from weights that would teach it nothing, or that are of another model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from learner_ranks import Ranks
from safetensors.torch import load_file, save_file
from test_learner_state import refusal_case

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Tensors = dict[str, torch.Tensor]


def not_finite(tensors: Tensors) -> str:
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name][:, -1] = torch.nan
    return f"{name} holds numbers that are not finite"


def other_head(tensors: Tensors) -> str:
    tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors[HEAD][:, 0] += 1
    return f"tie_word_embeddings true, and {HEAD} is not {EMBEDDING}"


@pytest.mark.parametrize("harm", [not_finite, other_head])
@pytest.mark.parametrize("tp", [1, 2])
def test_the_tensor_is_named(
    ranks: Ranks, tiny_model: Callable[..., str], tmp_path: Path, harm: Callable[[Tensors], str], tp: int
) -> None:
    """By each rank that reads some of it."""
    shutil.copytree(tiny_model(tied=True), model := tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    told = harm(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert told in ranks.run(refusal_case, world=tp, model=str(model), learn={"tp": tp})[-1]
