"""Settings that change in the course of a run: ``run.by_step``."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

from system.config.schema import Config

KEYS = ("rollout.temperature", "learn.clip_low", "learn.clip_high")


def at_step(config: Config, step: int) -> Config:
    """``config`` with the settings of ``run.by_step`` as they are at training step ``step``, from 0: straight
    lines between the steps that are given, level before the first and after the last.
    """
    changed = config
    for key, course in config.run.by_step.items():
        section, name = key.split(".")
        part = dataclasses.replace(getattr(changed, section), **{name: _at(course, step)})
        changed = dataclasses.replace(changed, **{section: part})
    return changed


def _at(course: Sequence[tuple[int, float]], step: int) -> float:
    for (left, low), (right, high) in itertools.pairwise(course):
        if step < right:
            return low + (high - low) * max(step - left, 0) / (right - left)
    return float(course[-1][1])


def course_problems(key: str, course: Any) -> Iterator[str]:
    """What is wrong with one course, apart from the bounds of its values."""
    where = f"run.by_step.{key}"
    if key not in KEYS:
        yield f"{where}: only {', '.join(KEYS)} can change by the step (the learning rate: learn.lr_decay)"
    elif not _is_course(course):
        yield f"{where}={course!r} must be pairs of a step and a value: [[0, 1.0], [100, 0.8]]"
    elif any(left >= right for (left, _), (right, _) in itertools.pairwise(course)) or course[0][0] < 0:
        yield f"{where}={course!r}: the steps must rise, from 0 or more"


def _is_course(value: Any) -> TypeGuard[Sequence[tuple[int, float]]]:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(pair, list)
            and len(pair) == 2
            and type(pair[0]) is int
            and type(pair[1]) in (int, float)
            for pair in value
        )
    )
