"""The section ``learn.lora`` of the configuration: adapters in place of the whole model."""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field
from __future__ import annotations

from dataclasses import dataclass

from system.config.rule import setting

PARTS = {"q": "q", "k": "k", "v": "v", "o": "out", "gate": "gate", "up": "up", "down": "down"}
"""What ``learn.lora.targets`` calls a projection -> its part (``system.models.families.base.NAMES``)."""

ATTENTION = ("q", "k", "v", "o")
"""Those targets that every token goes through in a mixture of experts, too: all that one takes."""

MODULES = {part: f"{target}_proj" for target, part in PARTS.items()}
"""A part -> what the module that computes it is called, by PEFT and SGLang too."""


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA) on projections of a model whose own weights stay as they are."""

    rank: int = setting(0, "r of the adapters; 0: no adapters, the whole model is trained", least=0)
    alpha: float = setting(32.0, "their outputs are multiplied by alpha / rank", above=0)
    targets: list[str] = setting(
        [],
        f"the projections that have one, of {', '.join(PARTS)}; empty: all of them, of a mixture of experts "
        f"{', '.join(ATTENTION)}",
    )
    init: str = setting(
        "",
        "a directory in PEFT's format to start from, of the same rank, alpha and targets; empty: A drawn by "
        "run.seed, B zero, so that training begins at the model itself",
        path=True,
    )

    sync: str = setting(
        "auto",
        "what travels to the engines: adapter, which a request keeps to its end; merged, all weights; auto: "
        "adapter to the embedded engine, and for a bfloat16 model to SGLang servers of the run's own, else "
        "merged",
        choices=("auto", "adapter", "merged"),
        safe_on_resume=True,
    )

    @property
    def on(self) -> bool:
        return self.rank > 0

    def parts(self, *, experts: bool) -> tuple[str, ...]:
        """The parts of a layer that have an adapter, in the order of the computation; ``experts``: of a
        mixture of experts, of which what is refused (``expert_problems``) counts for nothing.
        """
        possible = ATTENTION if experts else (*PARTS,)
        return tuple(PARTS[target] for target in possible if target in (self.targets or possible))
