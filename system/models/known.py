"""The shapes of published Qwen2.5 and Qwen3 models by name, and of the model that a configuration names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from system.config import ConfigError, ModelConfig
from system.models.shape import ModelShape
from system.plugins import nearest

TINY_VOCAB = 512  # of a model that the run will make; its tokenizer does not exist yet


def _shape(
    name: str, family: str, vocab: int, hidden: int, layers: int, heads: int, kv: int, ffn: int, tied: bool
) -> ModelShape:
    config = {
        "model_type": family,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ffn,
        "tie_word_embeddings": tied,
        "rope_theta": 1e6,
        "max_position_embeddings": 32_768 if family == "qwen2" else 40_960,
    }
    return ModelShape.from_config(config, name)


# What the published config.json files of these models say (positions: of the instruction-tuned ones).
KNOWN: dict[str, ModelShape] = {
    shape.name.lower(): shape
    for shape in (
        _shape("Qwen2.5-0.5B", "qwen2", 151_936, 896, 24, 14, 2, 4864, True),
        _shape("Qwen2.5-1.5B", "qwen2", 151_936, 1536, 28, 12, 2, 8960, True),
        _shape("Qwen2.5-3B", "qwen2", 151_936, 2048, 36, 16, 2, 11_008, True),
        _shape("Qwen2.5-7B", "qwen2", 152_064, 3584, 28, 28, 4, 18_944, False),
        _shape("Qwen2.5-14B", "qwen2", 152_064, 5120, 48, 40, 8, 13_824, False),
        _shape("Qwen2.5-32B", "qwen2", 152_064, 5120, 64, 40, 8, 27_648, False),
        _shape("Qwen3-0.6B", "qwen3", 151_936, 1024, 28, 16, 8, 3072, True),
        _shape("Qwen3-1.7B", "qwen3", 151_936, 2048, 28, 16, 8, 6144, True),
        _shape("Qwen3-4B", "qwen3", 151_936, 2560, 36, 32, 8, 9728, True),
        _shape("Qwen3-8B", "qwen3", 151_936, 4096, 36, 32, 8, 12_288, False),
        _shape("Qwen3-14B", "qwen3", 151_936, 5120, 40, 40, 8, 17_408, False),
        _shape("Qwen3-32B", "qwen3", 151_936, 5120, 64, 64, 8, 25_600, False),
    )
}
_FINE_TUNES = ("-instruct", "-base")


def shape_of(model: ModelConfig) -> ModelShape:
    """The shape of the model that ``model`` names: a directory, a known name, or the tiny one to be made.

    ``Qwen/Qwen2.5-7B-Instruct`` is known as well as ``Qwen2.5-7B``.  Raises :class:`ConfigError` for a path
    that is neither.
    """
    if not model.path:
        sizes = model.hidden_size, model.layers, model.heads, model.kv_heads, model.ffn_size
        tiny = _shape("tiny", "qwen3", TINY_VOCAB, *sizes, tied=True)
        return replace(tiny, head_dim=model.hidden_size // model.heads)
    if (Path(model.path) / "config.json").is_file():
        return ModelShape.from_directory(model.path)
    name = Path(model.path).name.lower()
    for ending in _FINE_TUNES:
        name = name.removesuffix(ending)
    if name in KNOWN:
        return KNOWN[name]
    names = [shape.name for shape in KNOWN.values()]
    raise ConfigError(
        f"model.path={model.path}: neither a directory with a config.json nor one of {', '.join(names)}"
        f"{nearest(Path(model.path).name, names)}"
    )
