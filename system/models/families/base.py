"""What a family of models is: the record that each family's file fills in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from system.models.reading import UnsupportedModel

# What the parts of a decoder are called in its files; those of a layer behind the layer's own name.
NAMES: Mapping[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",  # behind the last layer
    "head": "lm_head.weight",  # of a model that is not tied
    "layer": "model.layers.{}.",
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "out": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "router": "mlp.gate.weight",  # of a sparse layer, in place of its MLP; and each of its experts
    "expert_gate": "mlp.experts.{}.gate_proj.weight",
    "expert_up": "mlp.experts.{}.up_proj.weight",
    "expert_down": "mlp.experts.{}.down_proj.weight",
}


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """A decoder (RMS norms, grouped-query attention, rotary positions, SwiGLU), and how it varies.

    Learner, embedded engine, plan and export read it through :class:`~system.models.shape.ModelShape`.
    """

    name: str  # `model_type` of its config.json
    title: str  # for people
    qkv_bias: bool = False  # the projections to queries, keys and values add a bias
    qk_norm: bool = False  # RMSNorm over each head of queries and keys
    experts: bool = False  # layers may be mixtures of experts (system/models/experts.py)
    # What config.json may leave out, as transformers has it.
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    positions: int = 32_768  # max_position_embeddings
    window: int | None = None  # sliding_window: how many tokens attention reaches back; None: all
    window_switch: str = ""  # the key that turns the window on; empty: it is on
    refused: Mapping[str, str] = field(
        default_factory=dict[str, str], hash=False
    )  # key that must not be set -> why
    names: Mapping[str, str] = field(default_factory=lambda: NAMES, hash=False)  # of its tensors

    def check(self, config: Mapping[str, Any], positions: int) -> None:
        """Raises :class:`UnsupportedModel` for a key of a ``config.json`` that would be computed wrongly.

        ``positions``: that the model knows.
        """
        for key, why in self.refused.items():
            if config.get(key):
                raise UnsupportedModel(f"{key} {config[key]!r}: {why}")
        on = not self.window_switch or config.get(self.window_switch)
        window = config.get("sliding_window", self.window) if on else None
        if window is not None and window < positions:
            raise UnsupportedModel(
                f"{self.window_switch or 'sliding_window'}: attention reaches back {window} tokens and the "
                f"model knows {positions} positions; windows are not computed here: take a model without, or "
                f"set max_position_embeddings to {window} in its config.json"
            )
