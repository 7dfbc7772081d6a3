"""What a Hugging Face ``config.json`` says about a model of our families, and what follows from it: the
tensors such a model has, its parameters and its KV cache.  Engine, learner and plans read it here: none of
them has to import transformers for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from system.models.experts import Experts
from system.models.families import ModelFamily, family_of
from system.models.float8 import Float8
from system.models.reading import UnsupportedModel, number, whole
from system.models.rope import Rope


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder, and the family that it is of (names as in the field, not as in any one config
    file).
    """

    family: ModelFamily
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int  # width of the MLP of a layer that is not sparse
    eps: float
    rope: Rope
    max_position: int  # positions that it knows
    tied: bool  # the output head is the embedding
    experts: Experts | None = None  # of the sparse layers, if there are any
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
        family = family_of(config.get("model_type"))
        stated = whole(config, "max_position_embeddings", family.positions)
        rope = Rope.read(config, stated)
        positions = rope.positions(stated)
        family.check(config, positions)
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedModel(f"hidden_act {config['hidden_act']!r}; supported: silu")
        Float8.read(config)  # refuses what is quantised otherwise
        tied = config.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise UnsupportedModel(f"tie_word_embeddings {tied!r}; it is true or false")
        heads, hidden = whole(config, "num_attention_heads"), whole(config, "hidden_size")
        fewer = heads if "num_key_value_heads" in config else family.kv_heads or heads
        kv_heads = whole(config, "num_key_value_heads", fewer)
        if heads % kv_heads:
            raise UnsupportedModel(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
            )
        layers = whole(config, "num_hidden_layers")
        return cls(
            family=family,
            vocab=whole(config, "vocab_size"),
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            experts=Experts.read(config, layers) if family.experts else None,
            head_dim=whole(config, "head_dim", family.head_dim or hidden // heads),
            ffn=whole(config, "intermediate_size"),
            eps=number(config, "rms_norm_eps", 1e-6),
            rope=rope,
            max_position=positions,
            tied=tied,
            name=name,
        )

    def sparse(self, layer: int) -> bool:
        """Whether a layer is a mixture of experts."""
        return self.experts is not None and self.experts.at(layer)

    def divided(self, *, whole_experts: bool = False) -> dict[str, int]:
        """Sizes that tensor parallelism divides, by name; ``whole_experts``: it leaves those undivided."""
        sizes = {"heads": self.heads, "kv_heads": self.kv_heads}
        if self.experts is None or self.experts.layers < self.layers:
            sizes["ffn"] = self.ffn
        if self.experts and not whole_experts:
            sizes["experts' ffn"] = self.experts.ffn
        return sizes

    @property
    def attention_matrices(self) -> int:
        """Parameters of one layer's projections to and from its heads, with their biases."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        biases = q + 2 * kv if self.family.qkv_bias else 0
        return self.hidden * (2 * q + 2 * kv) + biases

    def matrices(self, layer: int) -> int:
        """Parameters of a layer that tensor parallelism divides, but for experts."""
        return self.attention_matrices + (0 if self.sparse(layer) else 3 * self.hidden * self.ffn)

    def copied(self, layer: int) -> int:
        """Parameters of a layer that every tensor-parallel rank holds: norms, and the router."""
        router = self.hidden * self.experts.count if self.experts and self.sparse(layer) else 0
        return 2 * self.hidden + (2 * self.head_dim if self.family.qk_norm else 0) + router

    def of_experts(self, layer: int) -> int:
        """Parameters of all experts of a layer."""
        return self.experts.count * self._expert if self.experts and self.sparse(layer) else 0

    @property
    def _expert(self) -> int:
        """Parameters of one expert."""
        return 3 * self.hidden * self.experts.ffn if self.experts else 0

    @property
    def embedding(self) -> int:
        """Parameters of the embedding table."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All of them; the head counts unless it is the embedding."""
        each = (self.matrices(at) + self.copied(at) + self.of_experts(at) for at in range(self.layers))
        return sum(each) + self.hidden + self.embedding * (1 if self.tied else 2)

    def mlp(self, layer: int) -> int:
        """Parameters of a layer's MLP that a token is multiplied with: of a sparse layer the router and the
        experts that are chosen.
        """
        if self.experts and self.sparse(layer):
            return self.hidden * self.experts.count + self.experts.chosen * self._expert
        return 3 * self.hidden * self.ffn

    @property
    def active(self) -> int:
        """Parameters that a token is multiplied with: neither the embedding table it is looked up in, nor the
        experts that are not chosen for it.
        """
        mlps = sum(self.mlp(at) for at in range(self.layers))
        return self.layers * self.attention_matrices + mlps + self.embedding

    def kv_bytes_per_token(self, width: int = 2) -> int:
        """Key and value of one token in all layers, at ``width`` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * width

    def layer_parts(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The parts that a layer has (words of ``families.base.NAMES``) but for experts, and their shapes."""
        q, kv, wide = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden
        parts: dict[str, tuple[int, ...]] = {"attention_norm": (wide,), "mlp_norm": (wide,)}
        parts |= {"q": (q, wide), "k": (kv, wide), "v": (kv, wide), "out": (wide, q)}
        if self.family.qkv_bias:
            parts |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
        if self.family.qk_norm:
            parts |= {"q_norm": (self.head_dim,), "k_norm": (self.head_dim,)}
        if self.experts and self.sparse(layer):
            return parts | {"router": (self.experts.count, wide)}
        return parts | {"gate": (self.ffn, wide), "up": (self.ffn, wide), "down": (wide, self.ffn)}

    @property
    def expert_parts(self) -> dict[str, tuple[int, ...]]:
        """The parts of each expert, and their shapes; none without experts."""
        if self.experts is None:
            return {}
        wide, ffn = self.hidden, self.experts.ffn
        return {"expert_gate": (ffn, wide), "expert_up": (ffn, wide), "expert_down": (wide, ffn)}

    def tensor(self, part: str, layer: int | None = None, expert: int | None = None) -> str:
        """The Hugging Face name of a part: of a layer if ``layer`` is one, of its ``expert`` if that is."""
        names = self.family.names
        own = names[part] if expert is None else names[part].format(expert)
        return own if layer is None else names["layer"].format(layer) + own

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's Hugging Face name and shape.  A tied model has no output head."""
        table = (self.vocab, self.hidden)
        shapes: dict[str, tuple[int, ...]] = {self.tensor("embedding"): table}
        for layer in range(self.layers):
            shapes |= {self.tensor(part, layer): size for part, size in self.layer_parts(layer).items()}
            if self.experts and self.sparse(layer):
                shapes |= {
                    self.tensor(part, layer, expert): size
                    for expert in range(self.experts.count)
                    for part, size in self.expert_parts.items()
                }
        shapes[self.tensor("norm")] = (self.hidden,)
        return shapes if self.tied else shapes | {self.tensor("head"): table}


def vocabulary(directory: str | Path) -> int:
    """Tokens that the model in ``directory``, of any family, has scores for; 0: its ``config.json`` does not
    say.  They may be more than its tokenizer names.
    """
    file = Path(directory) / "config.json"
    config: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 0)
