"""Can SGLang serve a model as the learner computes it, and take its weights?"""

from __future__ import annotations

from collections.abc import Iterator

from system.config import Config
from system.config.precision import FROM_FLOAT8, REQUANTISES, float8_weights, sglang_flags
from system.models.float8 import Float8
from system.models.shape import ModelShape

REQUANTISED = ("qwen2", "qwen3")  # the models that this loader of SGLang 0.5.23 quantises anew


def sglang_misfits(config: Config, shape: ModelShape) -> Iterator[str]:
    """Each a line with its remedy; ``shape``: of the model in ``model.path``, or of the one to be made."""
    if config.engine.name != "sglang":
        return
    path = config.model.path
    if name := shape.rope.disputed:
        how = "does not read" if name == "attention_factor" else "reads otherwise than transformers does"
        yield (
            f"model.path: {path} sets {name} of its rotary embedding, which SGLang {how}: "
            "take it out of config.json if it is what YaRN says anyway, or set engine=embedded"
        )
    if path and Float8.of_directory(path):
        yield f"model.path: {path} has {FROM_FLOAT8}, or set engine=embedded"
    if float8_weights(sglang_flags(config.engine.sglang)) and shape.family.name not in REQUANTISED:
        yield (
            f"engine.sglang.quantization=fp8: SGLang's {REQUANTISES} loader quantises "
            f"{' and '.join(REQUANTISED)} anew, and not {shape.family.name}: take it out"
        )
