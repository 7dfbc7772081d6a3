"""Every registered family as tiny models: what learner and engine are compared with Hugging Face on.

A family that is registered is tested without being named here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from system.models.families import FAMILIES, ModelFamily

# Stretched from 64 positions, so that a test's few dozen tokens see the difference.
ROPES: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "default": {"rope_type": "default", "rope_theta": 1e6},
}

# (family, tied, rope): each family untied and tied, and each time another way to turn.
VARIANTS = [
    (family, tied, list(ROPES)[(number - tied) % len(ROPES)])
    for number, family in enumerate(sorted(FAMILIES))
    for tied in (False, True)
]
NAMES = [f"{family}-{'tied' if tied else 'untied'}-{rope}" for family, tied, rope in VARIANTS]


def family_config(family: str, tied: bool, rope: str = "default", **sizes: Any) -> PreTrainedConfig:
    """transformers' configuration of a model without a window of attention."""
    known = FAMILIES.get(family)
    own: dict[str, Any] = {}
    if known and known.window and not known.window_switch:
        own["sliding_window"] = None
    if known and known.experts:  # untied: in all layers; tied: not in the first, weights add up to less
        own = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        own |= {"norm_topk_prob": not tied, "mlp_only_layers": [0] if tied else []}
    own |= {"rope_parameters": dict(ROPES[rope])}
    return AutoConfig.for_model(family, tie_word_embeddings=tied, **(own | sizes))


def as_in_files(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers holds the experts of a layer in one tensor; its files have each by itself."""
    named: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.partition("experts.")
        for expert, own in enumerate(tensor if part else []):
            match part:
                case "gate_up_proj":
                    gate, up = own.chunk(2)
                    named |= {f"{layer}experts.{expert}.gate_proj.weight": gate}
                    named |= {f"{layer}experts.{expert}.up_proj.weight": up}
                case _:
                    named[f"{layer}experts.{expert}.{part}.weight"] = own
        if not part:
            named[name] = tensor
    return named


def documented() -> str:
    """The file of a new family that ``docs/models.md`` shows."""
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    return source


def register(source: str) -> ModelFamily:
    """What adding a file of this content, and its line, does."""
    made: dict[str, Any] = {}
    exec(source, made)
    FAMILIES[made["FAMILY"].name] = made["FAMILY"]
    return made["FAMILY"]
