"""Checks of the machine that the run is on, and of what it reaches: disk, memory, servers, ports, hub."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from glob import glob
from pathlib import Path
from shutil import disk_usage
from socket import socket

from psutil import virtual_memory

from system.config import ChosenReward, Config, ConfigError, all_rewards
from system.doctor import adapters
from system.doctor.answering import ANSWER_S, at_once, unanswered
from system.doctor.problem import Problem
from system.engine.sglang.command import interpreter
from system.http import HttpError
from system.models.reading import UnsupportedModel
from system.models.shape import ModelShape
from system.observe import hub, views
from system.plan.memory import WIDTH, besides_saved
from system.plan.units import byte_size
from system.rollout.rewards.judge import Judge
from system.rollout.rewards.judge_server import blamed
from system.rollout.scorer import make_reward
from system.text import one_line
from system.urls import Allowed

MIB = 1 << 20
SLACK = 64 * MIB  # what a run writes besides checkpoints, at least


def disk(config: Config) -> Iterator[Problem]:
    """Can ``run.dir`` be written, and does it hold a checkpoint?  The same of ``engine.weights_dir``, which
    holds what servers have loaded and what they are to load.
    """
    needed = SLACK + _checkpoint_bytes(config) + adapters.merged_bytes(config, _parameters(config))
    yield from _kept(f"run.dir={config.run.dir}", Path(config.run.dir), needed, "one checkpoint takes")
    engine = config.engine
    if engine.weights == "disk" and engine.weights_dir:
        needed = 2 * WIDTH[config.model.dtype] * _parameters(config)
        field = f"engine.weights_dir={engine.weights_dir}"
        yield from _kept(field, Path(engine.weights_dir), needed, "two updates take")


def _kept(field: str, wanted: Path, needed: int, what: str) -> Iterator[Problem]:
    """Can files be written in a directory that may not be there yet, and so many bytes of them?"""
    wanted = wanted.absolute()
    there = next(path for path in (wanted, *wanted.parents) if os.path.lexists(path))
    if not there.is_dir():
        yield Problem(field, f"{there} is no directory", "name one that can be written")
    elif fault := _unwritable(there):
        yield Problem(field, f"it cannot be written: {fault}", "name one that can")
    elif (free := disk_usage(there).free) < needed:
        found = f"{byte_size(free)} are free there, {what} {byte_size(needed)}"
        yield Problem(field, found, "make room, or name a larger file system")


def _checkpoint_bytes(config: Config) -> int:
    """Float32 weights that are trained, both of Adam's moments, and the models that are kept besides."""
    each = 12 + besides_saved(config.learn, config.model.dtype)
    return each * adapters.trained(config, _parameters(config))


def _parameters(config: Config) -> int:
    """Of the model; of one that is made here (a few megabytes) none."""
    try:
        return ModelShape.from_directory(config.model.path).parameters if config.model.path else 0
    except UnsupportedModel:
        return 0  # told by :func:`system.doctor.recipe_checks.model`


def engine(config: Config) -> Iterator[Problem]:
    """The interpreter that runs SGLang."""
    if config.engine.name == "sglang" and not config.engine.urls:
        interpreter(config.engine)
    yield from ()


def servers(config: Config) -> Iterator[Problem]:
    """Do the servers that are to be there already answer?"""
    asked = {f"engine.urls={url}": url for url in config.engine.urls}
    if "search" in config.tools.names and config.tools.search_url:
        asked[f"tools.search_url={config.tools.search_url}"] = config.tools.search_url
    if "browse" in config.tools.names:
        bases = Allowed(config.tools.browse_allow).bases
        asked |= {f"tools.browse_allow={base.url}": base.url for base in bases if base.url}
    keys = {"agent.token_env": config.agent.token_env}
    if config.learn.teacher == "server":
        asked |= {f"teacher.urls={url}": url for url in config.teacher.urls}
        keys["teacher.api_key_env"] = config.teacher.api_key_env
    for reward in all_rewards(config):
        if url := reward.options.get("base_url"):
            asked[_base_url(reward)] = str(url)
        keys[f"{reward.key}.options.api_key_env"] = str(reward.options.get("api_key_env") or "")
    for field, name in keys.items():
        if name and not os.environ.get(name):
            yield Problem(f"{field}={name}", "this environment variable is not set, or empty", "export it")
    address = config.cluster.address
    if re.fullmatch(r"[^/]+:\d+", address):
        asked[f"cluster.address={address}"] = address
    faults = unanswered(asked)
    for field, fault in faults.items():
        yield Problem(field, f"does not answer ({fault})", "start it, or correct the address")
    yield from _refusing(config, [one for one in all_rewards(config) if _base_url(one) not in faults])


def ray(config: Config) -> Iterator[Problem]:
    """Is there a Ray cluster, where several nodes are wanted?"""
    if config.cluster.nodes > 1 and not _joins(config):
        found = "no Ray cluster is named, and this machine is one node"
        yield Problem(f"cluster.nodes={config.cluster.nodes}", found, "use submit, or set cluster.address")


def _base_url(reward: ChosenReward) -> str:
    return f"{reward.key}.options.base_url={reward.options.get('base_url')}"


def _refusing(config: Config, rewards: Sequence[ChosenReward]) -> Iterator[Problem]:
    """Judges whose servers do not grade: each is asked for one grade.  Those that cannot be made, or have no
    key, are told elsewhere.
    """
    different = {str(one.options): one for one in reversed(rewards) if one.name == "judge"}
    asked: dict[str, Callable[[], HttpError | None]] = {}
    for reward in different.values():
        with contextlib.suppress(ConfigError):
            judge = make_reward(config, reward, secret=os.environ.get)
            asked[f"{reward.key}.options"] = partial(_refusal, judge)
    for options, error in at_once(asked).items():
        if error is not None:
            option, remedy = blamed(error)
            yield Problem(f"{options}.{option}", one_line(error), remedy)


def _refusal(judge: Judge) -> HttpError | None:
    try:
        asyncio.run(judge.check(ANSWER_S))
    except HttpError as error:
        return error
    return None


def gpus(config: Config) -> Iterator[Problem]:
    """Are there any, where some are wanted?"""
    wanted = config.cluster.gpus_per_node
    if wanted and not _joins(config) and not (glob("/dev/nvidia[0-9]*") or glob("/dev/dxg")):
        remedy = "run it where there are, or set cluster.gpus_per_node=0"
        yield Problem(f"cluster.gpus_per_node={wanted}", "this machine has no GPU", remedy)


def ports(config: Config) -> Iterator[Problem]:
    """Can servers listen where they are to?"""
    if _joins(config):  # each node has its own address there
        return
    try:
        with socket() as listening:
            listening.bind((config.engine.host, 0))
    except (OSError, UnicodeError) as error:
        remedy = "set it to an address of this machine, such as 127.0.0.1"
        yield Problem(f"engine.host={config.engine.host}", f"no server can listen there ({error})", remedy)


def memory(config: Config) -> Iterator[Problem]:
    """Does this machine hold an offloaded optimizer, and its copy while a checkpoint is written?"""
    if config.learn.offload and not _joins(config):
        state = 12 * adapters.trained(config, _parameters(config))
        free, needed = virtual_memory().available, state + _checkpoint_bytes(config)
        if free < needed:
            found = f"{byte_size(free)} of memory are free, optimizer and checkpoint take {byte_size(needed)}"
            yield Problem(
                "learn.offload=true", found, "set it to false, and spread the learner over more GPUs"
            )


def scratch(config: Config) -> Iterator[Problem]:
    """The directory for temporary files: Ray's session, programs of the python tool."""
    try:
        place = Path(tempfile.gettempdir())
    except OSError as error:
        yield Problem("TMPDIR", str(error), "set TMPDIR to a directory that can be written")
        return
    if (free := disk_usage(place).free) < SLACK:
        found = f"{free // MIB} MiB are free in {place}"
        yield Problem("TMPDIR", found, "make room there, or set TMPDIR to another place")


def _joins(config: Config) -> bool:
    """Whether the run has the nodes of a Ray cluster, not this machine alone."""
    return bool(config.cluster.address or os.environ.get("RAY_ADDRESS"))


def _unwritable(place: Path) -> str:
    """What the system has against a file in the directory ``place``: one without a name is written there."""
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def upload(config: Config) -> Iterator[Problem]:
    """Where the model shall go at the end of the run."""
    if config.run.push and (why := hub.problem(config.run.push)):
        yield Problem(f"run.push={config.run.push}", why)


def wanted_views(config: Config) -> Iterator[Problem]:
    """Can the views of its figures be had here?"""
    yield from (Problem("", line) for line in views.unavailable(config))
