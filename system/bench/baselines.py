"""The ways to run that benchmarks compare: the recipes in ``configs/baselines``, some with another η."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from system.config import Config, load

BASELINES = Path(__file__).parents[2] / "configs" / "baselines"


@dataclass(frozen=True)
class Way:
    """A baseline's recipe, and overrides of it."""

    recipe: str
    overrides: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return BASELINES / f"{self.recipe}.yaml"

    @cache  # noqa: B019  # ways are few, and merging takes half a second
    def config(self, *settings: str) -> Config:
        """The recipe under ``settings``, which this way's own overrides overrule."""
        return load(self.path, [*settings, *self.overrides])


WAYS = {
    "lockstep": Way("released-arpo"),
    "tree sync": Way("espalier", ("flow.staleness=0",)),
    "tree async η=1": Way("espalier"),
    "tree async η=4": Way("espalier", ("flow.staleness=4",)),
    "eager async η=1": Way("eager"),
    "eager async η=4": Way("eager", ("flow.staleness=4",)),
    "linear lockstep": Way("grpo-rounds"),
    "linear sync": Way("synchronous"),
    "linear one-step-off": Way("one-step-off"),
    "linear async η=1": Way("fully-async", ("flow.staleness=1",)),
    "linear async η=4": Way("fully-async"),
}
