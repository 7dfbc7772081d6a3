"""The section ``learn.lora`` of the configuration: adapters in place of the whole model."""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from system.config.rule import setting

PARTS = {"q": "q", "k": "k", "v": "v", "o": "out", "gate": "gate", "up": "up", "down": "down"}
"""What ``learn.lora.targets`` calls a projection -> its part (``system.models.families.base.NAMES``)."""


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA) on projections of a model whose own weights stay as they are."""

    rank: int = setting(0, "r of the adapters; 0: no adapters, the whole model is trained", least=0)
    alpha: float = setting(32.0, "their outputs are multiplied by alpha / rank", above=0)
    targets: list[str] = setting([*PARTS], f"the projections that have one, of {', '.join(PARTS)}")
    init: str = setting(
        "",
        "a directory in PEFT's format to start from, of the same rank, alpha and targets; empty: A drawn by "
        "run.seed, B zero, so that training begins at the model itself",
        path=True,
    )

    sync: str = setting(
        "auto",
        "what travels to the engines: adapter, which a request keeps to its end; merged, all weights; auto: "
        "adapter to the embedded engine, merged to SGLang",
        choices=("auto", "adapter", "merged"),
        safe_on_resume=True,
    )

    @property
    def on(self) -> bool:
        return self.rank > 0

    def apart(self, engine: str) -> bool:
        """Whether adapters travel to engines of that name by themselves; else the learner merges them."""
        return self.on and (self.sync == "adapter" or (self.sync == "auto" and engine == "embedded"))

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a layer that have an adapter, in the order of the computation."""
        return tuple(part for target, part in PARTS.items() if target in self.targets)


_OURS = ("enable_lora", "max_lora_rank", "lora_target_modules", "lora_paths", "max_loaded_loras")


def lora_problems(
    lora: LoraConfig, proximal: str, engine: str, weights: str, sglang: Iterable[str]
) -> Iterator[str]:
    """A line each, with the remedy.  ``proximal``: ``learn.proximal``; ``engine``: its name; ``weights``:
    ``engine.weights``; ``sglang``: flags of ``engine.sglang``.
    """
    yield from _incomplete(lora)
    if not (lora.on and lora.targets):
        return
    if proximal == "average":
        yield (
            "learn.proximal=average: no moving average of adapters is kept: set learn.proximal=start or "
            "closed, or learn.lora.rank=0"
        )
    flags = [flag for flag in sglang if "lora" in flag]
    if engine != "sglang" or not lora.apart(engine):  # flags of another engine are refused elsewhere
        if flags:
            yield (
                f"engine.sglang.{flags[0]}: SGLang gets merged weights (docs/lora.md), and would keep room "
                "for adapters that never come: take it out, or set learn.lora.sync=adapter"
            )
        return
    if ours := [flag for flag in flags if flag.replace("-", "_") in _OURS]:
        yield f"engine.sglang.{ours[0]} is set by learn.lora: take it out"
    if weights != "auto":
        yield (
            f"engine.weights={weights} is a way for all weights, and with learn.lora.sync=adapter there is "
            "one for adapters: set it to auto"
        )


def _incomplete(lora: LoraConfig) -> Iterator[str]:
    for target in lora.targets:
        if target not in PARTS:
            yield f"learn.lora.targets: {target!r}: choose of {', '.join(PARTS)}"
    if not lora.on:
        if lora.init:
            yield f"learn.lora.init={lora.init}: set learn.lora.rank to its rank too, or take it out"
        return
    if not lora.targets:
        yield f"learn.lora.targets is empty: nothing would be trained; name some of {', '.join(PARTS)}"
