"""Weights and caches of fewer bits in SGLang (``engine.sglang``): which of its flags go with weights that are
replaced while it runs, and what of them a plan has to know (docs/precision.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from system.config.schema import Config

# SGLang's loader that quantises anew what it is sent; its other loaders copy into codes, or fail.
REQUANTISES = "flash_rl"
# What to do about a float8 checkpoint that SGLang is to be started from.
FROM_FLOAT8 = (
    "float8 weights with scales, with which SGLang would compute, and take no new weights into them: write "
    "it once as bfloat16 (`espalier dequantise MODEL DIR`) and name that, of which "
    f"engine.sglang={{quantization: fp8, load_format: {REQUANTISES}}} makes float8 again"
)
FLOAT8_CACHES = ("fp8_e5m2", "fp8_e4m3")
_CACHES = ("auto", "bf16", "bfloat16", *FLOAT8_CACHES)
_OTHERS = ("torchao_config", "modelopt_quant", "rl_quant_profile")


def sglang_flags(given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that are on, under their names in SGLang's code."""
    return {
        str(name).replace("-", "_"): value
        for name, value in given.items()
        if value is not None and value is not False
    }


def float8_weights(flags: Mapping[str, Any]) -> bool:
    """Whether SGLang, started with ``flags``, makes float8 numbers of the weights that it is given."""
    return flags.get("quantization") == "fp8"


def precision_problems(config: Config) -> Iterator[str]:
    """Flags of SGLang with which weights could not be brought in, or not proved; a line each."""
    flags, engine = sglang_flags(config.engine.sglang), config.engine
    kind, loader = flags.get("quantization"), flags.get("load_format")
    if kind not in (None, "fp8"):
        yield (
            f"engine.sglang.quantization={kind}: SGLang takes no new weights into it while it runs: set "
            f"engine.sglang={{quantization: fp8, load_format: {REQUANTISES}}}, or take it out"
        )
    if kind == "fp8" and loader != REQUANTISES:
        yield (
            "engine.sglang.quantization=fp8: SGLang would copy new weights into the codes of old ones: set "
            f"engine.sglang.load_format={REQUANTISES} too, which quantises them anew"
        )
    if loader == REQUANTISES and kind is None:
        yield f"engine.sglang.load_format={REQUANTISES} quantises: set engine.sglang.quantization=fp8 too"
    if kind == "fp8" and engine.weights == "disk":
        yield (
            f"engine.weights=disk: SGLang's {REQUANTISES} loader reads files once, at its start: set "
            "engine.weights=distributed (or tensor, or auto)"
        )
    if kind == "fp8" and config.model.dtype != "bfloat16":
        yield (
            "engine.sglang.quantization=fp8 is made of bfloat16 weights, and "
            f"model.dtype={config.model.dtype}: set model.dtype=bfloat16"
        )
    if kind == "fp8" and config.learn.lora.on and config.learn.lora.sync == "adapter":
        yield (
            "engine.sglang.quantization=fp8 with learn.lora.sync=adapter has not been tried: set "
            "learn.lora.sync=merged, or take it out"
        )
    cache = flags.get("kv_cache_dtype", "auto")
    if engine.device == "cpu" and (kind == "fp8" or cache in FLOAT8_CACHES):
        yield "engine.device=cpu: SGLang computes with float8 on a GPU only: take it out of engine.sglang"
    if cache not in _CACHES:
        yield f"engine.sglang.kv_cache_dtype={cache} is not supported: choose of {', '.join(_CACHES)}"
    for name in _OTHERS:
        if name in flags:
            yield (
                f"engine.sglang.{name}: SGLang takes no new weights into what it makes of them: take it out; "
                "quantization and kv_cache_dtype are supported (docs/precision.md)"
            )
