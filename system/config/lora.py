"""Which way adapters (``learn.lora``) go to the engines, and settings that do not go with them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from system.config.precision import float8_weights, sglang_flags
from system.config.schema import Config
from system.config.schema_lora import PARTS, LoraConfig

WELL_KEPT = 0.99  # of what adapters change, in merged weights: nothing to tell of
_OURS = ("enable_lora", "max_lora_rank", "lora_target_modules", "lora_paths", "max_loaded_loras")


def adapters_travel(config: Config) -> bool:
    """Whether adapters travel to the engines by themselves; else the learner merges them into all weights."""
    lora = config.learn.lora
    if not lora.on or lora.sync == "merged":
        return False
    if lora.sync == "adapter" or config.engine.name == "embedded":
        return True
    return config.model.dtype == "bfloat16" and not merged_because(config)


def merged_because(config: Config) -> str:
    """The setting for which ``learn.lora.sync=auto`` merges for SGLang, whatever the dtype; empty: none."""
    engine = config.engine
    if engine.urls:
        return "engine.urls (a server that others started may take no adapters)"
    if engine.weights != "auto":
        return f"engine.weights={engine.weights} (a way for all weights)"
    if engine.device == "cpu":
        return "engine.device=cpu (without a GPU SGLang takes adapters of some models only)"
    flags = sglang_flags(engine.sglang)
    if float8_weights(flags):
        return "engine.sglang.quantization=fp8 (with adapters it has not been tried)"
    if "speculative_algorithm" in flags:
        return "engine.sglang.speculative_algorithm (with adapters it has not been tried)"
    return ""


def going_on(config: Config) -> Config:
    """``config`` of a run that has checkpoints: what it started from is in them, and need not be there."""
    told = copy.deepcopy(config)
    told.learn.lora.init = ""
    return told


def merging_warning(config: Config, kept: float) -> str:
    """What to tell of weights that hold the share ``kept`` of what adapters change (``Rounding.kept``);
    empty where they hold nearly all of it.
    """
    if kept >= WELL_KEPT:
        return ""
    auto, reason = config.learn.lora.sync == "auto", merged_because(config)
    because = f"; auto merges because of {reason}" if auto and reason else ""
    return (
        f"merged in {config.model.dtype}, the engines' weights keep {kept:.0%} of what the adapters change "
        "(of its squared norm; weights/lora_kept), rounding loses the rest: set learn.lora.sync=adapter, or "
        f"model.dtype=float32{because}"
    )


def lora_problems(config: Config) -> Iterator[str]:
    """A line each, with the remedy."""
    lora, engine = config.learn.lora, config.engine
    yield from _incomplete(lora)
    if not lora.on:
        return
    if config.learn.proximal == "average":
        yield (
            "learn.proximal=average: no moving average of adapters is kept: set learn.proximal=start or "
            "closed, or learn.lora.rank=0"
        )
    flags = [str(flag) for flag in engine.sglang if "lora" in str(flag)]
    if engine.name != "sglang" or not adapters_travel(config):
        if flags:  # of another engine they are refused elsewhere
            yield (
                f"engine.sglang.{flags[0]}: SGLang gets merged weights (docs/lora.md), and would keep room "
                "for adapters that never come: take it out, or set learn.lora.sync=adapter"
            )
        return
    if ours := [flag for flag in flags if flag.replace("-", "_") in _OURS]:
        yield f"engine.sglang.{ours[0]} is set by learn.lora: take it out"
    if engine.weights != "auto":
        yield (
            f"engine.weights={engine.weights} is a way for all weights, and with learn.lora.sync=adapter "
            "there is one for adapters: set it to auto"
        )


def _incomplete(lora: LoraConfig) -> Iterator[str]:
    for target in lora.targets:
        if target not in PARTS:
            yield f"learn.lora.targets: {target!r}: choose of {', '.join(PARTS)}"
    if lora.init and not lora.on:
        yield (
            f"learn.lora.init={lora.init} does nothing while learn.lora.rank=0 (the whole model is "
            "trained): set learn.lora.rank too, or take it out"
        )
