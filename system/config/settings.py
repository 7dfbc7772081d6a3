"""Every setting by its key, with its rule: what the checks, the reference and a resumed run read."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any

from system.config.rule import Rule
from system.config.schema import Config

SAFE_SECTIONS = ("eval", "checkpoint", "observe", "cluster", "slurm")  # all of them is safe on resume


@dataclass(frozen=True)
class Setting:
    """One field of a section, as the rules and the settings reference see it."""

    section: str
    name: str  # with a dot in a section within: lora.rank
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
        return attrgetter(self.key)(config)


@cache
def settings() -> dict[str, Setting]:
    """Every setting by its key, in the order of the schema."""
    found: list[Setting] = []
    for section in dataclasses.fields(Config):
        values = getattr(Config(), section.name)
        found += _within(section.name, values)
    return {one.key: one for one in found}


def _within(section: str, values: Any, prefix: str = "") -> Iterator[Setting]:
    """The fields of a section, and those of sections within it (fields that have no rule of their own)."""
    kinds = typing.get_type_hints(type(values))
    for one in dataclasses.fields(values):
        value, name = getattr(values, one.name), prefix + one.name
        if rule := one.metadata.get("rule"):
            yield Setting(section, name, kinds[one.name], value, rule)
        else:
            yield from _within(section, value, f"{name}.")
