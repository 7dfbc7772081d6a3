"""Llama 2 and 3.x, and the many models that are built like them (Yi, DeepSeek-LLM, SmolLM2, …)."""

from system.models.families.base import ModelFamily

_BIAS = "biases of the output and feed-forward projections are not computed here, and Meta's models have none"

FAMILY = ModelFamily(
    name="llama",
    title="Llama 2, 3, 3.1, 3.2, 3.3",
    positions=2048,
    refused={"attention_bias": _BIAS, "mlp_bias": _BIAS},
)
