"""Every setting by its key, with its rule: what the checks, the reference and a resumed run read."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any

from system.config.rule import Rule
from system.config.schema import Config

SAFE_SECTIONS = ("eval", "checkpoint", "observe", "cluster", "slurm")  # all of them is safe on resume


@dataclass(frozen=True)
class Setting:
    """One field of a section, as the rules and the settings reference see it."""

    section: str
    name: str
    kind: Any  # its type
    default: Any
    rule: Rule

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def safe_on_resume(self) -> bool:
        return self.rule.safe_on_resume or self.section in SAFE_SECTIONS

    def of(self, config: Config) -> Any:
        """Its value in ``config``."""
        return getattr(getattr(config, self.section), self.name)


@cache
def settings() -> dict[str, Setting]:
    """Every setting by its key, in the order of the schema."""
    found: list[Setting] = []
    for section in dataclasses.fields(Config):
        values = getattr(Config(), section.name)
        kinds = typing.get_type_hints(type(values))
        for one in dataclasses.fields(values):
            value = getattr(values, one.name)
            found.append(Setting(section.name, one.name, kinds[one.name], value, one.metadata["rule"]))
    return {one.key: one for one in found}
