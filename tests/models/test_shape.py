"""What our one reader of ``config.json`` finds is what transformers finds, or it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import NAMES, VARIANTS, family_config
from transformers import AutoConfig, AutoModelForCausalLM

from system.config import ConfigError, ModelConfig
from system.config.schema import MADE_FAMILIES
from system.models.directory import SINGLE, header, weight_files
from system.models.families import FAMILIES
from system.models.files import write_index
from system.models.known import shape_of
from system.models.reading import UnsupportedModel
from system.models.shape import ModelShape

SIZES = {
    "vocab_size": 151,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
QWEN3 = {"model_type": "qwen3", **SIZES}


@pytest.mark.parametrize(("family", "tied", "rope"), VARIANTS, ids=NAMES)
def test_reads_what_transformers_reads(family: str, tied: bool, rope: str, tmp_path: Path) -> None:
    written = family_config(family, tied, rope, **SIZES)
    written.save_pretrained(tmp_path)
    hf, shape = AutoConfig.from_pretrained(tmp_path), ModelShape.from_directory(tmp_path)
    assert shape.family.name == hf.model_type
    assert (shape.vocab, shape.hidden, shape.layers) == (hf.vocab_size, hf.hidden_size, hf.num_hidden_layers)
    assert (shape.heads, shape.kv_heads) == (hf.num_attention_heads, hf.num_key_value_heads)
    assert shape.head_dim == (getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)
    assert (shape.ffn, shape.eps) == (hf.intermediate_size, hf.rms_norm_eps)
    assert (shape.rope.theta, shape.rope.kind) == (hf.rope_parameters["rope_theta"], rope)
    assert shape.max_position == hf.max_position_embeddings * (2 if rope == "linear" else 1)
    assert shape.tied == tied


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_file_leaves_out_is_as_in_transformers(family: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {"model_type": family, **SIZES}
    if FAMILIES[family].window and not FAMILIES[family].window_switch:
        config["sliding_window"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    hf, shape = AutoConfig.from_pretrained(tmp_path), ModelShape.from_directory(tmp_path)
    assert shape.head_dim == (getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)
    assert (shape.eps, shape.max_position) == (hf.rms_norm_eps, hf.max_position_embeddings)
    assert shape.rope.theta == hf.rope_parameters["rope_theta"]
    assert shape.tied == hf.tie_word_embeddings
    older = ModelShape.from_config({**config, "rope_theta": 5e5})  # as files of transformers 4 have it
    assert older.rope.theta == 5e5


@pytest.mark.parametrize(
    ("family", "said"),
    [*((family, {}) for family in FAMILIES), ("llama", {"num_key_value_heads": None})],
)
def test_key_and_value_heads_that_a_file_does_not_say(
    family: str, said: dict[str, Any], tmp_path: Path
) -> None:
    config = {
        **SIZES,
        "model_type": family,
        "sliding_window": None,
        "num_attention_heads": 64,
        "hidden_size": 128,
    }
    del config["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config | said))
    hf = AutoConfig.from_pretrained(tmp_path)
    assert ModelShape.from_directory(tmp_path).kv_heads == hf.num_key_value_heads


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "olmo"}, "model_type 'olmo'; supported: llama, mistral, qwen2, qwen3, qwen3_moe"),
        ({"model_type": "qwen2_moe"}, "model_type 'qwen2_moe' (another mixture of experts than Qwen3's)"),
        ({"model_type": "qwen3_moe", "attention_bias": True}, "attention_bias True: a bias of the output"),
        ({"model_type": "qwen3_moe", "num_experts": 4}, "num_experts_per_tok 8 is more than the 4 experts"),
        ({"model_type": "qwen3_moe", "num_experts": 0}, "num_experts 0; it is a whole number above 0"),
        (
            {"model_type": "qwen3_moe", "num_experts": 64, "num_local_experts": 32},
            "num_experts 64, num_local_experts 32: two names of one number",
        ),
        ({"model_type": "qwen3_moe", "norm_topk_prob": 1}, "norm_topk_prob 1; it is true or false"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": 1}, "mlp_only_layers 1; it is a list"),
        ({"model_type": "qwen3_moe", "moe_intermediate_size": 0}, "moe_intermediate_size 0;"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0, 1, 2]}, "none of the 3 layers has experts"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 4}, "none of the 3 layers has experts"),
        ({"model_type": "gemma3_text"}, "model_type 'gemma3_text' (norms by 1 + weight"),
        ({"model_type": "qwen3_next"}, "does not branch within a packed tree"),
        ({"use_sliding_window": True}, "use_sliding_window: attention reaches back 4096 tokens"),
        ({"model_type": "mistral"}, "sliding_window: attention reaches back 4096 tokens"),
        ({"model_type": "mistral", "sliding_window": 128}, "knows 131072 positions"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias True: biases of the output"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias True: biases of the output"),
        ({"attention_bias": True}, "attention_bias True: a bias of the output"),
        ({"model_type": "qwen2", "dual_chunk_attention_config": {"chunk_size": 8}}, "attention by chunks"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'factor' is missing"),
        ({"rms_norm_eps": 0}, "rms_norm_eps 0; it is a number above 0"),
        ({"hidden_size": 0}, "hidden_size 0; it is a whole number above 0"),
        ({"num_hidden_layers": -8}, "num_hidden_layers -8;"),
        ({"num_attention_heads": 1.5}, "num_attention_heads 1.5;"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0;"),
        ({"vocab_size": "151"}, "vocab_size '151';"),
        ({"vocab_size": None}, "vocab_size None;"),
        ({"head_dim": True}, "head_dim True;"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is no multiple of num_key_value_heads 4"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings 'no'; it is true or false"),
    ],
)
def test_refuses_by_name_what_would_be_computed_wrongly(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**QWEN3, **change}))
    with pytest.raises(UnsupportedModel) as refused:
        ModelShape.from_directory(tmp_path)
    assert named in str(refused.value)
    assert str(tmp_path / "config.json") in str(refused.value)


def test_a_missing_file_or_size_is_a_config_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        ModelShape.from_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in QWEN3.items() if k != "vocab_size"}))
    with pytest.raises(ConfigError, match="'vocab_size' is missing"):
        ModelShape.from_directory(tmp_path)


def test_a_window_as_long_as_the_context_is_none() -> None:
    short = {"model_type": "mistral", **SIZES, "sliding_window": 4096, "max_position_embeddings": 4096}
    assert ModelShape.from_config(short).max_position == 4096
    none = {"model_type": "mistral", **SIZES, "sliding_window": None}
    assert ModelShape.from_config(none).max_position == 131_072
    off = {"model_type": "qwen2", **SIZES, "use_sliding_window": False, "sliding_window": 16}
    assert ModelShape.from_config(off).max_position == 32_768


@pytest.mark.parametrize(("family", "tied", "rope"), VARIANTS, ids=NAMES)
def test_the_tensors_are_those_of_the_models_file(family: str, tied: bool, rope: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(family_config(family, tied, rope, **SIZES)).save_pretrained(tmp_path)
    shape = ModelShape.from_directory(tmp_path)
    written = header(tmp_path / SINGLE)
    assert shape.tensors() == {name: tuple(tensor["shape"]) for name, tensor in written.items()}
    assert shape.parameters == sum(math.prod(tensor) for tensor in shape.tensors().values())


MOE: dict[str, Any] = {"model_type": "qwen3_moe", **SIZES, "moe_intermediate_size": 40, "head_dim": 8}


@pytest.mark.parametrize(
    ("said", "sparse"),
    [
        ({}, [0, 1, 2]),
        ({"mlp_only_layers": [1]}, [0, 2]),
        ({"decoder_sparse_step": 2}, [1]),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [0]}, [2]),
    ],
)
def test_which_layers_have_experts_is_as_in_transformers(said: dict[str, Any], sparse: list[int]) -> None:
    shape = ModelShape.from_config(MOE | said)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(MOE | said)))
    found = [at for at, layer in enumerate(hf.model.layers) if hasattr(layer.mlp, "experts")]
    assert [at for at in range(3) if shape.sparse(at)] == found == sparse
    assert shape.experts is not None
    assert shape.experts.layers == len(sparse)
    assert shape.parameters == sum(parameter.numel() for parameter in hf.parameters())


def test_experts_under_both_names_and_by_default(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MOE))
    hf, said = AutoConfig.from_pretrained(tmp_path), ModelShape.from_directory(tmp_path).experts
    assert said is not None
    assert (said.count, said.chosen, said.ffn) == (hf.num_experts, hf.num_experts_per_tok, 40) == (128, 8, 40)
    assert said.normalised == hf.norm_topk_prob
    for name in ("num_experts", "num_local_experts"):
        other = ModelShape.from_config({**MOE, name: 16}).experts
        assert other is not None
        assert other.count == 16


def test_a_token_is_multiplied_with_its_experts_alone() -> None:
    moe = shape_of(ModelConfig(path="Qwen/Qwen3-30B-A3B"))
    assert moe.active == 3_041_656_832  # "3.3B activated" counts the embedding table too
    one = ModelShape.from_config(MOE | {"num_experts": 4, "num_experts_per_tok": 1, "mlp_only_layers": [0]})
    attention, dense = 48 * 8 * (2 * 6 + 2 * 2), 3 * 48 * 80
    sparse = 4 * 48 + 3 * 48 * 40  # the router and one expert
    assert one.active == 3 * attention + dense + 2 * sparse + 151 * 48
    assert [one.matrices(at) for at in range(3)] == [attention + dense, attention, attention]
    assert [one.of_experts(at) for at in range(3)] == [0, 4 * 3 * 48 * 40, 4 * 3 * 48 * 40]
    assert [one.copied(at) - 2 * 48 - 2 * 8 for at in range(3)] == [0, 4 * 48, 4 * 48]


# As published in the metadata of their files.
@pytest.mark.parametrize(
    ("path", "parameters", "positions"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512, 32_768),
        ("Qwen/Qwen3-14B", 14_768_307_200, 40_960),
        ("Qwen/Qwen3-30B-A3B", 30_532_122_624, 40_960),
        ("Qwen/Qwen3-235B-A22B", 235_093_634_560, 40_960),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, 131_072),
        ("meta-llama/Meta-Llama-3.1-8B", 8_030_261_248, 131_072),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400, 131_072),
        ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, 131_072),
        ("meta-llama/Llama-3.3-70B-Instruct", 70_553_706_496, 131_072),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552, 32_768),
        ("mistralai/Mistral-Nemo-Instruct-2407", 12_247_782_400, 131_072),
    ],
)
def test_published_models_are_known_by_name(path: str, parameters: int, positions: int) -> None:
    shape = shape_of(ModelConfig(path=path))
    assert (shape.parameters, shape.max_position) == (parameters, positions)


def test_models_made_here_are_of_a_family() -> None:
    assert set(MADE_FAMILIES) <= set(FAMILIES)
    assert "qwen2" not in MADE_FAMILIES
    for family in MADE_FAMILIES:
        assert shape_of(ModelConfig(family=family)).family is FAMILIES[family]


def test_weights_that_are_not_all_there_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="no safetensors weights"):
        weight_files(tmp_path)
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, 8)
    (tmp_path / "one.safetensors").touch()
    with pytest.raises(UnsupportedModel, match=r"two\.safetensors is missing"):
        weight_files(tmp_path)
