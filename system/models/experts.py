"""Mixtures of experts: which layers have one, and which of its many small MLPs a token goes through.

A sparse layer has a router in place of its one MLP: the softmax of a linear map of the token scores all
experts, the ``chosen`` best compute, and their outputs are added with those scores as weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from system.models.reading import UnsupportedModel, whole


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixtures of a model, which are alike in all of its sparse layers."""

    count: int  # experts of a layer
    chosen: int  # that a token goes through
    ffn: int  # width of one
    normalised: bool  # the weights of the chosen ones add up to 1
    layers: int  # how many layers are sparse; the others have one dense MLP
    every: int  # only layers whose number, from 1, is a multiple of this are sparse
    dense: frozenset[int]  # and of these not the ones named here, by their number from 0

    def at(self, layer: int) -> bool:
        """Whether a layer, numbered from 0, is sparse."""
        return layer not in self.dense and (layer + 1) % self.every == 0

    @classmethod
    def read(cls, config: Mapping[str, Any], layers: int) -> Experts:
        """From a ``config.json`` of Qwen's words; what may be absent has transformers' defaults.

        Files of the hub say ``num_experts``, those that transformers 5 writes ``num_local_experts``.
        """
        own = [name for name in ("num_experts", "num_local_experts") if config.get(name) is not None]
        if len({config[name] for name in own}) > 1:
            said = ", ".join(f"{name} {config[name]!r}" for name in own)
            raise UnsupportedModel(f"{said}: two names of one number; take the wrong one out")
        count = whole(config, own[0] if own else "num_experts", 128)
        chosen = whole(config, "num_experts_per_tok", 8)
        if chosen > count:
            raise UnsupportedModel(f"num_experts_per_tok {chosen} is more than the {count} experts")
        normalised: Any = config.get("norm_topk_prob", False)
        if not isinstance(normalised, bool):
            raise UnsupportedModel(f"norm_topk_prob {normalised!r}; it is true or false")
        every = whole(config, "decoder_sparse_step", 1)
        dense: Any = config.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(type(one) is int for one in dense):
            raise UnsupportedModel(f"mlp_only_layers {dense!r}; it is a list of layers' numbers")
        kept = {at for at in dense if 0 <= at < layers and (at + 1) % every == 0}
        sparse = layers // every - len(kept)
        if not sparse:
            raise UnsupportedModel(
                f"decoder_sparse_step {every}, mlp_only_layers {dense}: none of the {layers} layers has "
                "experts; such a model is a dense one (model_type qwen3)"
            )
        ffn = whole(config, "moe_intermediate_size", 768)
        return cls(count, chosen, ffn, normalised, sparse, every, frozenset(dense))
