"""Everything about a run that can be told in a second, looked at before anything is started.

``espalier train``, ``submit`` and ``doctor`` call it, and nothing else looks at the same things.  No check
starts a process of the run, imports Ray, or leaves a file behind; each yields all that it finds.  On a login
node only those of :data:`ANYWHERE` are asked: what concerns the machine the run is on waits for the job.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path

from system.config import Config, ConfigError
from system.config.lora import going_on
from system.doctor import machine_checks, question_checks, recipe_checks
from system.doctor.problem import Check, Problem
from system.errors import EXPECTED


def look(
    config: Config,
    *,
    login: bool = False,
    resume: Path | None = None,
    without: Collection[str] = (),
    training: bool = True,
) -> dict[str, list[Problem]]:
    """The problems by topic; a topic without any has an empty list.

    ``login``: this is not the machine that the run will be on.  ``resume``: the run directory of a run that
    goes on.  ``without``: topics that are left out.  ``training``: false for an evaluation alone.
    """
    if resume is not None:
        saved = any((resume / "checkpoints").glob("v" + 6 * "[0-9]"))
        config = going_on(config) if saved else copy.deepcopy(config)
        config.run.dir = str(resume)
    asked = ANYWHERE if login else ANYWHERE | ON_THE_SPOT
    asked = asked | (OF_TRAINING if training else OF_EVALUATION)
    if login and config.slurm.container != "none":
        without = {*without, *IN_CONTAINER}
    return {topic: _run(check, topic, config) for topic, check in asked.items() if topic not in without}


def require(
    config: Config,
    *,
    login: bool = False,
    resume: Path | None = None,
    without: Collection[str] = (),
    training: bool = True,
) -> None:
    """Raises :class:`ConfigError` with a line for each problem that :func:`look` finds."""
    found = look(config, login=login, resume=resume, without=without, training=training)
    if lines := [str(problem) for problems in found.values() for problem in problems]:
        raise ConfigError("\n".join(dict.fromkeys(lines)))


def _run(check: Check, topic: str, config: Config) -> list[Problem]:
    found: list[Problem] = []
    try:
        found.extend(check(config))
    except EXPECTED as error:
        found += Problem.several(error, topic)
    return found


ANYWHERE: dict[str, Check] = {
    "parts": recipe_checks.parts,
    "layout": recipe_checks.layout,
    "model": recipe_checks.model,
    "chat": recipe_checks.chat,
    "task": question_checks.task,  # or as of an evaluation
    "evaluation sets": question_checks.evaluation_sets,
    "run directory": machine_checks.disk,
}
OF_TRAINING: dict[str, Check] = {"sampling": recipe_checks.sampling}
OF_EVALUATION: dict[str, Check] = {"task": question_checks.held_out}
ON_THE_SPOT: dict[str, Check] = {
    "engine": machine_checks.engine,
    "servers": machine_checks.servers,
    "ray": machine_checks.ray,
    "gpus": machine_checks.gpus,
    "ports": machine_checks.ports,
    "memory": machine_checks.memory,
    "scratch": machine_checks.scratch,
    "hub": machine_checks.upload,
    "views": machine_checks.wanted_views,
}
LATER = ", ".join(ON_THE_SPOT)  # for people who submit
# May lie elsewhere in one: paths are those of its mounts.
IN_CONTAINER = ("model", "chat", "task", "evaluation sets")
