"""Mistral 7B and Mistral Nemo.  7B-v0.1 attends over a window, which is refused; later ones do not."""

from system.models.families.base import ModelFamily

FAMILY = ModelFamily(
    name="mistral",
    title="Mistral 7B (v0.2, v0.3), Mistral Nemo",
    kv_heads=8,
    positions=131_072,
    window=4096,
)
