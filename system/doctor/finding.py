"""What a check says of one thing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"  # it runs, but worse than it could, or not everything does
    PROBLEM = "problem"  # it stops the recipe


@dataclass(frozen=True, slots=True)
class Finding:
    level: Level
    topic: str
    found: str
    remedy: str = ""  # what to do; empty when all is well


def finding(bad: bool, topic: str, found: str, remedy: str, *, stops: bool) -> Finding:
    """``stops``: what is bad is a problem, not only a warning."""
    level = Level.PROBLEM if stops else Level.WARNING
    return Finding(level, topic, found, remedy) if bad else Finding(Level.OK, topic, found)
