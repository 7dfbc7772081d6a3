"""What a Hugging Face ``config.json`` says about a Qwen2 or Qwen3 dense model, and what follows from it: the
tensors such a model has, its parameters and its KV cache.  Engine, learner and plans read it here: none of
them has to import transformers for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from system.config import ConfigError

FAMILIES = ("qwen2", "qwen3")


class UnsupportedModel(ConfigError):
    """The model asks for something that is not computed here; the message names the file and the thing."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes and switches of a dense Qwen2/Qwen3 decoder (names as in the field, not as in any one config
    file).
    """

    family: str  # qwen2 | qwen3
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    eps: float
    rope_theta: float
    max_position: int
    tied: bool  # the output head is the embedding
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool  # RMSNorm over each head of q and k (Qwen3)
    name: str = ""  # for people

    @classmethod
    def from_directory(cls, path: str | Path) -> ModelShape:
        """Read ``config.json``.  Raises :class:`UnsupportedModel` for what would be computed wrongly."""
        file = Path(path) / "config.json"
        if not file.is_file():
            raise UnsupportedModel(f"no model in Hugging Face format in {path}: config.json is missing")
        try:
            return cls.from_config(json.loads(file.read_text(encoding="utf-8")), file.parent.name)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{file}: {error}") from None
        except KeyError as error:
            raise UnsupportedModel(f"{file}: {error} is missing") from None
        except (ValueError, TypeError, AttributeError, ZeroDivisionError, RecursionError) as error:
            raise UnsupportedModel(f"{file}: not the config.json of a model: {error}") from error

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "") -> ModelShape:
        """From the contents of a ``config.json``; what may be absent has transformers' defaults."""
        family = config.get("model_type")
        if family not in FAMILIES:
            raise UnsupportedModel(f"model_type {family!r}; supported: {', '.join(FAMILIES)}, dense")
        if config.get("use_sliding_window"):
            raise UnsupportedModel("use_sliding_window: sliding-window attention is not supported")
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedModel(f"hidden_act {config['hidden_act']!r}; supported: silu")
        if quantised := config.get("quantization_config"):
            kind = quantised.get("quant_method", "of an unnamed method")
            raise UnsupportedModel(
                f"quantization_config ({kind}): the weights are codes, and training needs numbers; use the "
                "model's float32 or bfloat16 weights"
            )
        bias = bool(config.get("attention_bias", False))
        tied = config.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise UnsupportedModel(f"tie_word_embeddings {tied!r}; it is true or false")
        heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
        kv_heads = _size(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise UnsupportedModel(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
            )
        return cls(
            family=family,
            vocab=_size(config, "vocab_size"),
            hidden=hidden,
            layers=_size(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=_size(config, "head_dim", hidden // heads if family == "qwen2" else 128),
            ffn=_size(config, "intermediate_size"),
            eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=_rope_theta(config),
            max_position=_size(config, "max_position_embeddings", 32768),
            tied=tied,
            qkv_bias=True if family == "qwen2" else bias,
            o_bias=False if family == "qwen2" else bias,
            qk_norm=family == "qwen3",
            name=name,
        )

    @property
    def matrices_per_layer(self) -> int:
        """Parameters of one layer that tensor parallelism divides: projections and their biases."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        biases = (q + 2 * kv if self.qkv_bias else 0) + (self.hidden if self.o_bias else 0)
        return self.hidden * (2 * q + 2 * kv + 3 * self.ffn) + biases

    @property
    def norms_per_layer(self) -> int:
        """Parameters of one layer that every tensor-parallel rank holds."""
        return 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding table."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All of them; the head counts unless it is the embedding."""
        layers = self.layers * (self.matrices_per_layer + self.norms_per_layer)
        return layers + self.hidden + self.embedding * (1 if self.tied else 2)

    @property
    def active(self) -> int:
        """Parameters that a token is multiplied with: all but the embedding table it is looked up in."""
        return self.layers * self.matrices_per_layer + self.embedding

    def kv_bytes_per_token(self, width: int = 2) -> int:
        """Key and value of one token in all layers, at ``width`` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * width

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's Hugging Face name and shape.  A tied model has no ``lm_head.weight``."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            shapes[name + "input_layernorm.weight"] = (self.hidden,)
            shapes[name + "post_attention_layernorm.weight"] = (self.hidden,)
            for part, rows in (("q", q), ("k", kv), ("v", kv)):
                shapes[f"{name}self_attn.{part}_proj.weight"] = (rows, self.hidden)
                if self.qkv_bias:
                    shapes[f"{name}self_attn.{part}_proj.bias"] = (rows,)
            shapes[name + "self_attn.o_proj.weight"] = (self.hidden, q)
            if self.o_bias:
                shapes[name + "self_attn.o_proj.bias"] = (self.hidden,)
            if self.qk_norm:
                shapes[name + "self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[name + "self_attn.k_norm.weight"] = (self.head_dim,)
            shapes[name + "mlp.gate_proj.weight"] = (self.ffn, self.hidden)
            shapes[name + "mlp.up_proj.weight"] = (self.ffn, self.hidden)
            shapes[name + "mlp.down_proj.weight"] = (self.hidden, self.ffn)
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes


def vocabulary(directory: str | Path) -> int:
    """Tokens that the model in ``directory``, of any family, has scores for; 0: its ``config.json`` does not
    say.  They may be more than its tokenizer names.
    """
    file = Path(directory) / "config.json"
    config: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 0)


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number above 0.  Raises KeyError where there is neither one nor a default."""
    value = config[name] if default is None else config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(f"{name} {value!r}; it is a whole number above 0")
    return value


def _rope_theta(config: Mapping[str, Any]) -> float:
    """Rotary base; transformers 5 keeps it in ``rope_parameters``, earlier files at the top level."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise UnsupportedModel(f"rope_type {kind!r}; supported: default")
    return float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
