"""Sizes of dense Qwen2/Qwen3-class decoders, and what follows from them: parameters and KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from system.config import ConfigError, ModelConfig
from system.shape import ModelShape

TINY_VOCAB = 512  # of a model that the run will make; its tokenizer does not exist yet


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder with grouped-query attention and a gated MLP."""

    name: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    tied: bool  # the output head is the embedding
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3

    @property
    def matrices_per_layer(self) -> int:
        """Parameters of one layer that tensor parallelism divides: projections and their biases."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        biases = q + 2 * kv if self.qkv_bias else 0
        return self.hidden * (2 * q + 2 * kv + 3 * self.ffn) + biases

    @property
    def norms_per_layer(self) -> int:
        """Parameters of one layer that every tensor-parallel rank holds."""
        return 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        layers = self.layers * (self.matrices_per_layer + self.norms_per_layer)
        return layers + self.hidden + self.embedding * (1 if self.tied else 2)

    @property
    def active(self) -> int:
        """Parameters that a token is multiplied with: all but the embedding table it is looked up in."""
        return self.layers * self.matrices_per_layer + self.embedding

    def kv_bytes_per_token(self, width: int = 2) -> int:
        """Key and value of one token in all layers, at ``width`` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * width


def _qwen2(
    name: str, vocab: int, hidden: int, layers: int, heads: int, kv: int, ffn: int, tied: bool
) -> Shape:
    return Shape(name, vocab, hidden, layers, heads, kv, hidden // heads, ffn, tied, qkv_bias=True)


def _qwen3(name: str, hidden: int, layers: int, heads: int, ffn: int, tied: bool) -> Shape:
    return Shape(name, 151_936, hidden, layers, heads, 8, 128, ffn, tied, qk_norm=True)


# The published config.json files of these models.
KNOWN: dict[str, Shape] = {
    shape.name.lower(): shape
    for shape in (
        _qwen2("Qwen2.5-0.5B", 151_936, 896, 24, 14, 2, 4864, True),
        _qwen2("Qwen2.5-1.5B", 151_936, 1536, 28, 12, 2, 8960, True),
        _qwen2("Qwen2.5-3B", 151_936, 2048, 36, 16, 2, 11_008, True),
        _qwen2("Qwen2.5-7B", 152_064, 3584, 28, 28, 4, 18_944, False),
        _qwen2("Qwen2.5-14B", 152_064, 5120, 48, 40, 8, 13_824, False),
        _qwen2("Qwen2.5-32B", 152_064, 5120, 64, 40, 8, 27_648, False),
        _qwen3("Qwen3-0.6B", 1024, 28, 16, 3072, True),
        _qwen3("Qwen3-1.7B", 2048, 28, 16, 6144, True),
        _qwen3("Qwen3-4B", 2560, 36, 32, 9728, True),
        _qwen3("Qwen3-8B", 4096, 36, 32, 12_288, False),
        _qwen3("Qwen3-14B", 5120, 40, 40, 17_408, False),
        _qwen3("Qwen3-32B", 5120, 64, 64, 25_600, False),
    )
}
_FINE_TUNES = ("-instruct", "-base")


def shape_of(model: ModelConfig) -> Shape:
    """The shape of the model that ``model`` names: a directory, a known name, or the tiny one to be made.

    ``Qwen/Qwen2.5-7B-Instruct`` is known as well as ``Qwen2.5-7B``.  Raises :class:`ConfigError` for a path
    that is neither.
    """
    if not model.path:
        head_dim = model.hidden_size // model.heads
        return Shape(
            "tiny",
            TINY_VOCAB,
            model.hidden_size,
            model.layers,
            model.heads,
            model.kv_heads,
            head_dim,
            model.ffn_size,
            tied=True,
            qk_norm=True,
        )
    if (Path(model.path) / "config.json").is_file():
        return read(Path(model.path))
    name = Path(model.path).name.lower()
    for ending in _FINE_TUNES:
        name = name.removesuffix(ending)
    if name in KNOWN:
        return KNOWN[name]
    known = ", ".join(shape.name for shape in KNOWN.values())
    raise ConfigError(f"model.path={model.path}: neither a directory with a config.json nor one of {known}")


def read(directory: Path) -> Shape:
    """The shape of a Hugging Face model; ConfigError for another family than Qwen2 and Qwen3."""
    model = ModelShape.from_directory(directory)
    return Shape(
        name=directory.name,
        vocab=model.vocab,
        hidden=model.hidden,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        ffn=model.ffn,
        tied=model.tied,
        qkv_bias=model.qkv_bias,
        qk_norm=model.qk_norm,
    )
