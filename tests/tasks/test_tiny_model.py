"""A new tiny model is a Hugging Face model like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from system.config import ModelConfig
from system.config.schema import MADE_FAMILIES
from system.models import directory
from system.models.shape import ModelShape
from system.tasks.quickstart import vocabulary
from system.tasks.tiny_model import MAX_POSITIONS, create_model


def test_model_loads_offline_and_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = vocabulary.build()
    create_model(tmp_path, tokenizer, ModelConfig(), seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.model_type == "qwen3"
    assert (model.config.vocab_size, model.config.hidden_size) == (len(tokenizer), 96)
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == loaded.eos_token_id == tokenizer.eos_token_id
    assert 200_000 < sum(p.numel() for p in model.parameters()) < 500_000
    logits = model(torch.tensor([loaded.encode("Q: 47 plus 12 ?")])).logits
    assert logits.shape == (1, 5, len(tokenizer))
    assert torch.isfinite(logits).all()
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 1


@pytest.mark.parametrize("family", MADE_FAMILIES)
def test_a_model_of_every_family_is_made(tmp_path: Path, family: str):
    tokenizer = vocabulary.build()
    create_model(tmp_path, tokenizer, ModelConfig(family=family, layers=1), seed=0)
    assert list(directory.faults(tmp_path)) == []
    shape = ModelShape.from_directory(tmp_path)
    assert (shape.family.name, shape.tied, shape.vocab) == (family, True, len(tokenizer))
    assert (shape.head_dim, shape.max_position) == (24, MAX_POSITIONS)
    words = "Q: 47 plus 12 ?"
    assert AutoTokenizer.from_pretrained(tmp_path).encode(words) == tokenizer.encode(words)
    weights = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    spread = {part: weights[f"model.layers.0.self_attn.{part}_proj.weight"].std().item() for part in "qkv"}
    wide = 96**-0.5
    bounded = family.startswith("qwen3")
    expected = {"q": wide, "k": wide, "v": wide} if bounded else {"q": 0.02, "k": 0.02, "v": wide}
    assert spread == pytest.approx(expected, rel=0.05)


def test_weights_follow_from_the_seed_and_leave_the_global_one_alone(tmp_path: Path):
    def weights(name: str, seed: int) -> dict[str, torch.Tensor]:
        create_model(tmp_path / name, vocabulary.build(), ModelConfig(layers=1), seed)
        return AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = weights("a", 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    again, other = weights("b", 1), weights("c", 2)
    assert all(torch.equal(first[k], again[k]) for k in first)
    key = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[key], other[key])
    assert first[key].std().item() == pytest.approx(96**-0.5, rel=0.05)
    assert first["model.embed_tokens.weight"].std().item() == pytest.approx(96**-0.5, rel=0.05)
    assert torch.equal(first["model.norm.weight"], torch.ones(96))


def test_bfloat16(tmp_path: Path):
    create_model(tmp_path, vocabulary.build(), ModelConfig(layers=1, dtype="bfloat16"), 0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path):
    bare = PreTrainedTokenizerFast(tokenizer_object=vocabulary.build().backend_tokenizer)
    with pytest.raises(ValueError, match="EOS"):
        create_model(tmp_path, bare, ModelConfig(), 0)
