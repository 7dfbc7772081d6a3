"""What can be told of a supervised run in a second, before anything is started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from system.cluster.placement import paper_nodes, place
from system.config import Config, ConfigError
from system.doctor.preflight import look
from system.doctor.problem import Problem
from system.errors import EXPECTED
from system.sft.forms import Forms
from system.sft.prepare import learner_config, make_encoder
from system.tasks.base import make_task
from system.tasks.files import data_files

# Of what training by reinforcement needs: the engines, their tools and questions, where they are used.
_OF_ROLLOUTS = ("layout", "task", "engine", "servers", "ray", "ports")


def require(config: Config, resume: Path | None = None, *, login: bool = False) -> None:
    """Raises :class:`ConfigError` with a line for each thing that would end the run; ``login`` as of
    :func:`system.doctor.preflight.look`.
    """
    asks = config.sft.samples > 0
    # A model is chosen by the task's own questions, and no probabilities of samples are computed.
    without = {"evaluation sets", "sampling"}
    if not asks:
        without |= {*_OF_ROLLOUTS} if config.model.path else {*_OF_ROLLOUTS} - {"task"}
    looked = look(learner_config(config), login=login, resume=resume, without=without)
    found = [one for some in looked.values() for one in some]
    # A container may have data and model elsewhere.
    elsewhere = login and config.slurm.container != "none"
    for check in (_form, _layout) if elsewhere else (_form, _layout, _data, _encoding, _questions):
        try:
            found += check(config)
        except EXPECTED as error:
            found += Problem.several(error, "sft")
    if found:
        raise ConfigError("\n".join(dict.fromkeys(map(str, found))))


def _form(config: Config) -> Iterator[Problem]:
    """Is it said what the data are?"""
    sft = config.sft
    Forms(sft.form, sft.columns)
    if not sft.path:
        yield Problem("sft.path", "empty", "name the conversations, for example sft.path=conversations.jsonl")


def _data(config: Config) -> Iterator[Problem]:
    """Are the files there?  They are read, all of them, when everything else is known to be right."""
    sft = config.sft
    for key, path in (("sft.path", sft.path), ("sft.eval_path", sft.eval_path)):
        try:
            data_files(path) if path else None
        except ConfigError as error:
            yield Problem(key, str(error))


def _layout(config: Config) -> Iterator[Problem]:
    """Does the learner fit on the nodes by itself?"""
    place(config, paper_nodes(config), "learner")
    yield from ()


def _encoding(config: Config) -> Iterator[Problem]:
    """Can conversations be put by the model's tokenizer?"""
    path = config.model.path
    if path and Path(path).is_dir():
        make_encoder(config, Path(path))
    yield from ()


def _questions(config: Config) -> Iterator[Problem]:
    """Is there something to choose a model by?"""
    if config.sft.samples and not len(make_task(config).eval()):
        found = f"task {config.task.name!r} has no held-out questions"
        yield Problem(f"sft.choose={config.sft.choose}", found, "set task.eval_path, or choose loss or last")
