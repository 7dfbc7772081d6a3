"""The shapes of published models by name, and of the model that a configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from system.config import ConfigError, ModelConfig
from system.models.shape import ModelShape
from system.plugins import nearest

TINY_VOCAB = 512  # of a model that the run will make; its tokenizer does not exist yet


_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# What published models of a series have in common; positions: of the instruction-tuned ones.
_QWEN25 = {"model_type": "qwen2", "rope_theta": 1e6, "max_position_embeddings": 32_768}
_QWEN3 = {"model_type": "qwen3", "rope_theta": 1e6, "max_position_embeddings": 40_960}
_A3B: dict[str, Any] = _QWEN3 | {
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
_A22B = _A3B | {"moe_intermediate_size": 1536}
_LLAMA31: dict[str, Any] = {
    "model_type": "llama",
    "rope_theta": 5e5,
    "max_position_embeddings": 131_072,
    "rope_scaling": _LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 8192},
    "rms_norm_eps": 1e-5,
}
_LLAMA32 = _LLAMA31 | {"rope_scaling": _LLAMA31["rope_scaling"] | {"factor": 32.0}}
_MISTRAL = {"model_type": "mistral", "rope_theta": 1e6, "sliding_window": None, "rms_norm_eps": 1e-5}
_V03 = _MISTRAL | {"max_position_embeddings": 32_768}
_NEMO = _MISTRAL | {"max_position_embeddings": 131_072, "head_dim": 128}


def _shape(
    name: str,
    series: Mapping[str, Any],
    vocab: int,
    hidden: int,
    layers: int,
    heads: int,
    kv: int,
    ffn: int,
    tied: bool,
) -> ModelShape:
    sizes: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ffn,
        "tie_word_embeddings": tied,
    }
    return ModelShape.from_config({**sizes, **series}, name)


# What the published config.json files of these models say.
KNOWN: dict[str, ModelShape] = {
    shape.name.lower(): shape
    for shape in (
        _shape("Qwen2.5-0.5B", _QWEN25, 151_936, 896, 24, 14, 2, 4864, True),
        _shape("Qwen2.5-1.5B", _QWEN25, 151_936, 1536, 28, 12, 2, 8960, True),
        _shape("Qwen2.5-3B", _QWEN25, 151_936, 2048, 36, 16, 2, 11_008, True),
        _shape("Qwen2.5-7B", _QWEN25, 152_064, 3584, 28, 28, 4, 18_944, False),
        _shape("Qwen2.5-14B", _QWEN25, 152_064, 5120, 48, 40, 8, 13_824, False),
        _shape("Qwen2.5-32B", _QWEN25, 152_064, 5120, 64, 40, 8, 27_648, False),
        _shape("Qwen3-0.6B", _QWEN3, 151_936, 1024, 28, 16, 8, 3072, True),
        _shape("Qwen3-1.7B", _QWEN3, 151_936, 2048, 28, 16, 8, 6144, True),
        _shape("Qwen3-4B", _QWEN3, 151_936, 2560, 36, 32, 8, 9728, True),
        _shape("Qwen3-8B", _QWEN3, 151_936, 4096, 36, 32, 8, 12_288, False),
        _shape("Qwen3-14B", _QWEN3, 151_936, 5120, 40, 40, 8, 17_408, False),
        _shape("Qwen3-32B", _QWEN3, 151_936, 5120, 64, 64, 8, 25_600, False),
        _shape("Qwen3-30B-A3B", _A3B, 151_936, 2048, 48, 32, 4, 6144, False),
        _shape("Qwen3-235B-A22B", _A22B, 151_936, 4096, 94, 64, 4, 12_288, False),
        _shape("Llama-3.1-8B", _LLAMA31, 128_256, 4096, 32, 32, 8, 14_336, False),
        _shape("Llama-3.1-70B", _LLAMA31, 128_256, 8192, 80, 64, 8, 28_672, False),
        _shape("Llama-3.2-1B", _LLAMA32, 128_256, 2048, 16, 32, 8, 8192, True),
        _shape("Llama-3.2-3B", _LLAMA32, 128_256, 3072, 28, 24, 8, 8192, True),
        _shape("Llama-3.3-70B", _LLAMA31, 128_256, 8192, 80, 64, 8, 28_672, False),
        _shape("Mistral-7B-v0.3", _V03, 32_768, 4096, 32, 32, 8, 14_336, False),
        _shape("Mistral-Nemo", _NEMO, 131_072, 5120, 40, 32, 8, 14_336, False),
    )
}
_WHICH = ("-instruct", "-base", "-2407")  # tuned or not, and of which month


def shape_of(model: ModelConfig) -> ModelShape:
    """The shape of the model that ``model`` names: a directory, a known name, or the tiny one to be made.

    ``Qwen/Qwen2.5-7B-Instruct`` is known as well as ``Qwen2.5-7B``, ``Meta-Llama-3.1-8B`` as
    ``Llama-3.1-8B``.  Raises :class:`ConfigError` for a path that is neither.
    """
    if not model.path:
        sizes = model.hidden_size, model.layers, model.heads, model.kv_heads, model.ffn_size
        alike = {
            "model_type": model.family,
            "sliding_window": None,
            "num_experts": model.experts,
            "num_experts_per_tok": model.experts_per_token,
            "moe_intermediate_size": model.expert_size,
        }
        tiny = _shape("tiny", alike, TINY_VOCAB, *sizes, tied=True)
        return replace(tiny, head_dim=model.hidden_size // model.heads)
    if (Path(model.path) / "config.json").is_file():
        return ModelShape.from_directory(model.path)
    name = Path(model.path).name.lower().removeprefix("meta-")
    for word in _WHICH:
        name = name.replace(word, "")
    if name in KNOWN:
        return KNOWN[name]
    names = [shape.name for shape in KNOWN.values()]
    raise ConfigError(
        f"model.path={model.path}: neither a directory with a config.json nor one of {', '.join(names)}"
        f"{nearest(Path(model.path).name, names)}"
    )
