"""What our one reader of ``config.json`` finds is what transformers finds, or it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, Qwen2Config, Qwen3Config

from system.config import ConfigError
from system.models.directory import weight_files
from system.models.files import write_index
from system.models.shape import ModelShape, UnsupportedModel

SIZES = {
    "vocab_size": 151,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
QWEN3 = {"model_type": "qwen3", **SIZES}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("theta", [10_000.0, 1e6])
@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config])
def test_reads_what_transformers_reads(kind: Any, theta: float, tied: bool, tmp_path: Path) -> None:
    written = kind(
        **SIZES, tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    written.save_pretrained(tmp_path)
    hf, shape = AutoConfig.from_pretrained(tmp_path), ModelShape.from_directory(tmp_path)
    assert shape.family == hf.model_type
    assert (shape.vocab, shape.hidden, shape.layers) == (hf.vocab_size, hf.hidden_size, hf.num_hidden_layers)
    assert (shape.heads, shape.kv_heads) == (hf.num_attention_heads, hf.num_key_value_heads)
    assert shape.head_dim == (getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)
    assert (shape.ffn, shape.eps) == (hf.intermediate_size, hf.rms_norm_eps)
    assert (shape.rope_theta, shape.max_position) == (theta, hf.max_position_embeddings)
    assert shape.tied == tied


@pytest.mark.parametrize(("family", "kind"), [("qwen2", Qwen2Config), ("qwen3", Qwen3Config)])
def test_what_a_file_leaves_out_is_as_in_transformers(family: str, kind: Any, tmp_path: Path) -> None:
    config = {"model_type": family, **SIZES}
    (tmp_path / "config.json").write_text(json.dumps(config))
    hf, shape = AutoConfig.from_pretrained(tmp_path), ModelShape.from_directory(tmp_path)
    assert isinstance(hf, kind)
    assert shape.head_dim == (getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)
    assert (shape.eps, shape.max_position) == (hf.rms_norm_eps, hf.max_position_embeddings)
    assert shape.rope_theta == hf.rope_parameters["rope_theta"]
    assert shape.tied == hf.tie_word_embeddings
    older = ModelShape.from_config({**config, "rope_theta": 5e5})  # as files of transformers 4 have it
    assert older.rope_theta == 5e5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_parameters_are_those_of_the_tensors(family: str, tied: bool) -> None:
    config = {**SIZES, "model_type": family, "tie_word_embeddings": tied, "attention_bias": True}
    shape = ModelShape.from_config(config)
    assert shape.parameters == sum(math.prod(tensor) for tensor in shape.tensors().values())


def test_weights_that_are_not_all_there_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="no safetensors weights"):
        weight_files(tmp_path)
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, 8)
    (tmp_path / "one.safetensors").touch()
    with pytest.raises(UnsupportedModel, match=r"two\.safetensors is missing"):
        weight_files(tmp_path)
