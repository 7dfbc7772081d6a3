"""The families of models that are computed here, a file each, and why others are not (``docs/models.md``)."""

from __future__ import annotations

from typing import Any

from system.models.families import llama, mistral, qwen2, qwen3, qwen3_moe
from system.models.families.base import NAMES, ModelFamily
from system.models.reading import UnsupportedModel

FAMILIES: dict[str, ModelFamily] = {
    family.name: family
    for family in (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY, qwen3_moe.FAMILY)
}

_EXPERTS = "another mixture of experts than Qwen3's"
_RECURRENCE = "its linear attention is a recurrence, which does not branch within a packed tree"
_GEMMA = "norms by 1 + weight, scaled embeddings, and windows of attention in most layers"
_GLM = "it rotates half of each head, in neighbouring pairs"
NOT_COMPUTED = {
    **dict.fromkeys(("mixtral", "qwen2_moe", "llama4", "llama4_text", "glm4_moe"), _EXPERTS),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), f"{_EXPERTS} with latent attention"),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text"), _RECURRENCE),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), _GEMMA),
    **dict.fromkeys(("glm", "glm4"), _GLM),
    "gpt_oss": f"{_EXPERTS} with attention sinks and windows",
    "phi3": "its projections are fused in its files, and its long contexts use longrope",
    "ministral": "windows of attention in most layers",
    "mistral3": "it sees images: save its language model by itself",
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "it sees images"),
}

__all__ = ["FAMILIES", "NAMES", "ModelFamily", "family_of"]


def family_of(model_type: Any) -> ModelFamily:
    """The family that a ``config.json`` names.  Raises :class:`UnsupportedModel` with the reason."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    why = f" ({NOT_COMPUTED[model_type]})" if model_type in NOT_COMPUTED else ""
    raise UnsupportedModel(f"model_type {model_type!r}{why}; supported: {', '.join(FAMILIES)}")
