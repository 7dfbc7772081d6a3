"""Everything about a run that can be told in a second, looked at before anything is started.

``espalier train``, ``submit`` and ``doctor`` call it, and nothing else looks at the same things.  No check
starts a process of the run, imports Ray, or leaves a file behind; each yields all that it finds.  On a login
node only those of :data:`ANYWHERE` are asked: what concerns the machine the run is on waits for the job.
"""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path
from shutil import disk_usage
from socket import socket
from typing import Any, TypeVar

from psutil import virtual_memory

from system.agents.forking import misfits as agent_misfits
from system.cluster.placement import paper_nodes, place
from system.config import Config, ConfigError, rewards
from system.config.check import part_problems, undivided
from system.config.lora import going_on
from system.doctor import adapters
from system.doctor.answering import unanswered
from system.doctor.experts import expert_misfits
from system.doctor.sglang_model import sglang_misfits
from system.engine.sglang.command import interpreter
from system.envs.make import make_environment
from system.errors import EXPECTED, EspalierError, told
from system.learn.sizes import context_block
from system.models import directory
from system.models.known import shape_of
from system.models.reading import UnsupportedModel
from system.models.shape import ModelShape
from system.observe import hub, views
from system.plan.memory import WIDTH, besides_saved
from system.plugins import AGENTS, POLICIES, TASKS
from system.rollout.branching import make_policy
from system.rollout.chat import make_chat, planned_syntax, unknown_arguments
from system.rollout.encode import local_tokenizer
from system.rollout.planting import misfits
from system.rollout.scorer import Scorer
from system.tasks.base import HasCorpus, HasDemonstrations, HasTokenizer, Task, make_task
from system.tasks.vocabulary import unknown_tokens
from system.tools.search_index import read_corpus
from system.tree.prompt import Prompt
from system.urls import Allowed

ROWS = 32  # of the data, that are read
MIB, GIB = 1 << 20, 1 << 30
T = TypeVar("T")
SLACK = 64 * MIB  # what a run writes besides checkpoints, at least


@dataclass(frozen=True, slots=True)
class Problem:
    """What would end the run.  ``field``: the setting at fault, where ``text`` does not begin with it."""

    field: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return (
            f"{self.field}{': ' if self.field else ''}{self.text}{'; ' if self.remedy else ''}{self.remedy}"
        )

    @classmethod
    def several(cls, error: BaseException, field: str = "") -> list[Problem]:
        """Of an error that names fields and remedies itself, a line each; or of one of the file system."""
        named = isinstance(error, EspalierError)
        lines = told(error).splitlines() if named else [told(error)]
        return [cls("" if named else field, " ".join(line.split())) for line in lines]


Check = Callable[[Config], Iterator[Problem]]


def look(
    config: Config, *, login: bool = False, resume: Path | None = None, without: Collection[str] = ()
) -> dict[str, list[Problem]]:
    """The problems by topic; a topic without any has an empty list.

    ``login``: this is not the machine that the run will be on.  ``resume``: the run directory of a run that
    goes on.  ``without``: topics that are left out.
    """
    if resume is not None:
        saved = any((resume / "checkpoints").glob("v" + 6 * "[0-9]"))
        config = going_on(config) if saved else copy.deepcopy(config)
        config.run.dir = str(resume)
    asked = ANYWHERE if login else ANYWHERE | ON_THE_SPOT
    if login and config.slurm.container != "none":
        without = {*without, *IN_CONTAINER}
    return {topic: _run(check, topic, config) for topic, check in asked.items() if topic not in without}


def require(
    config: Config, *, login: bool = False, resume: Path | None = None, without: Collection[str] = ()
) -> None:
    """Raises :class:`ConfigError` with a line for each problem that :func:`look` finds."""
    found = look(config, login=login, resume=resume, without=without)
    if lines := [str(problem) for problems in found.values() for problem in problems]:
        raise ConfigError("\n".join(dict.fromkeys(lines)))


def _run(check: Check, topic: str, config: Config) -> list[Problem]:
    found: list[Problem] = []
    try:
        found.extend(check(config))
    except EXPECTED as error:
        found += Problem.several(error, topic)
    return found


# --- what is the same on every machine that sees the same files ---------------------------------------------


def parts(config: Config) -> Iterator[Problem]:
    """The parts picked by name: can they be imported, do they take their options?"""
    problems = part_problems(config)
    yield from (Problem("", problem) for problem in problems)
    if problems:
        return
    if config.branching.options or config.branching.name not in POLICIES.table:
        make_policy(config.branching)
    yield from (Problem("", line) for line in (*misfits(config), *agent_misfits(config)))


def layout(config: Config) -> Iterator[Problem]:
    """Would learner, engines and servers fit on the nodes that are asked for, and rows on the learner?"""
    learn, gpu = config.learn, config.cluster.gpus_per_node > 0
    least = learn.cp * context_block(learn.tp, learn.sequence_parallel, gpu=gpu)
    if learn.cp > 1 and learn.micro_tokens < least:
        yield Problem(
            f"learn.micro_tokens={learn.micro_tokens}",
            f"a row has no block for each of the learn.cp={learn.cp} ranks",
            f"raise it to {least} or more, or lower learn.cp",
        )
    place(config, paper_nodes(config))


def model(config: Config) -> Iterator[Problem]:
    """The model's directory: configuration, every weight file, tokenizer; and the layout's sizes."""
    path = config.model.path
    if not path:
        if problem := unknown_arguments("", config.task.template):
            yield Problem("", problem)
        made = shape_of(config.model)
        for line in (*expert_misfits(config, made), *sglang_misfits(config, made)):
            yield Problem("", line)
        return
    if not Path(path).is_dir():
        remedy = "give a directory in Hugging Face format; a model's name on the hub is not downloaded"
        yield Problem("model.path", f"there is no directory {path}", remedy)
        return
    for fault in directory.faults(path):
        yield Problem("model.path", fault)
    if problem := unknown_arguments(directory.chat_template(path), config.task.template):
        yield Problem("", problem)
    try:
        shape = ModelShape.from_directory(path)
    except UnsupportedModel:
        return  # one of the faults
    yield from (Problem("", line) for line in adapters.misfit(config, shape))
    sizes = shape.divided(whole_experts=config.learn.ep > 1) | {"layers": shape.layers}
    lines = undivided(config, {f"{path}'s {name}": size for name, size in sizes.items()})
    for line in (*lines, *expert_misfits(config, shape), *sglang_misfits(config, shape)):
        yield Problem("", line)
    if config.engine.max_context > shape.max_position:
        yield Problem(
            f"engine.max_context={config.engine.max_context}",
            f"{path} knows {shape.max_position} positions (max_position_embeddings)",
            "lower it, name a model that was trained on more, or stretch this one by YaRN (docs/models.md)",
        )


def chat(config: Config) -> Iterator[Problem]:
    """Can the model's chat template put answers, where it is to (``rollout.answers``)?"""
    path, answers = config.model.path, config.rollout.answers
    wanted = answers == "template" or config.rollout.calls_per_turn == "many"
    if not path or not directory.chat_template(path):
        if wanted:
            keys = f"rollout.answers={answers}, rollout.calls_per_turn={config.rollout.calls_per_turn}"
            remedy = "set model.path to a model that has one, or take these settings out"
            yield Problem(keys, "the model has no chat template", remedy)
        return
    syntax = planned_syntax(config)
    if wanted or (answers == "auto" and syntax.new_turn):
        make_chat(config, local_tokenizer(path), path, syntax, make_environment(config.environment))


def task(config: Config) -> Iterator[Problem]:
    """The task's first questions, what else it must bring, and the reward that is made for it."""
    first = _first_rows(config)
    made = _own("task.name", config.task.name, lambda: make_task(first))
    for what, questions in (("training", made.train), ("held-out", made.eval)):
        rows: Sequence[Any] = _own("task.name", config.task.name, questions)
        if what == "training" and not len(rows):
            yield Problem(
                "task", f"{made.name} has no training questions", "correct task.path or its options"
            )
        if wrong := [row for row in rows[:ROWS] if not isinstance(row, Prompt)]:
            kind = type(wrong[0]).__name__
            yield Problem("task", f"a {what} question is a {kind}", "a task yields system.tree.prompt.Prompt")
        elif what == "training":
            unknown = unknown_tokens(config.model.path, rows[:ROWS])
            if unknown and unknown.too_many:
                yield Problem("model.path", str(unknown), "take a model that can read them")
            for name in config.agent.columns if config.agent.on else ():
                if rows and not any(name in row.extra for row in rows[:ROWS]):
                    known = (
                        ", ".join(dict.fromkeys(key for row in rows[:ROWS] for key in row.extra)) or "none"
                    )
                    found = f"none of the first questions of {made.name} has a column {name!r}"
                    yield Problem("agent.columns", found, f"name columns that are there: {known}")
            for name in _needed(config):
                if rows and not any(name in row.extra for row in rows[:ROWS]):
                    found = f"it plays questions with a column {name!r}, which those of {made.name} have not"
                    named = name if name in TASKS.names else "a task that has it"
                    yield Problem(f"agent.run={config.agent.run}", found, f"set task.name={named}")
            if config.guide.shows and not any(row.actions for row in rows[:ROWS]):
                found = f"none of the first questions of {made.name} has a demonstration with actions"
                remedy = "name their column (task.columns.demonstration), or take the settings of guide out"
                yield Problem("guide", found, remedy)
    yield from _brought(config, made)
    for number, reward in enumerate(rewards(config.reward)):
        _own(f"{reward.key}.name", reward.name, partial(Scorer.of, first, number, reward))


def _needed(config: Config) -> tuple[str, ...]:
    """Columns of the data that the agent asks for by itself."""
    return tuple(getattr(AGENTS.find(config.agent.run), "columns", ())) if config.agent.run else ()


def _brought(config: Config, made: Task) -> Iterator[Problem]:
    """What the run takes from its task besides questions."""
    if not config.model.path and not isinstance(made, HasTokenizer):
        remedy = "set model.path to a Hugging Face directory"
        yield Problem(
            "model.path", f"empty, and task {made.name!r} brings no tokenizer for a new model", remedy
        )
    if config.warmstart.steps and not isinstance(made, HasDemonstrations):
        found = f"{config.warmstart.steps}, but task {made.name!r} has no demonstrations"
        yield Problem("warmstart.steps", found, "set warmstart.steps=0")
    if "search" not in config.tools.names or config.tools.search_url:
        return
    if config.tools.corpus:
        if next(iter(read_corpus(config.tools.corpus, ROWS)), None) is None:
            yield Problem("tools.corpus", f"{config.tools.corpus} has no documents")
    elif not isinstance(made, HasCorpus):
        yield Problem(
            "tools.names",
            f"search has nothing to search: task {made.name!r} brings no corpus",
            "set tools.corpus, or tools.search_url, or take search out of tools.names",
        )


def _first_rows(config: Config) -> Config:
    """The same run on the first few rows of its data."""
    small = copy.deepcopy(config)
    for name in ("train_size", "eval_size"):
        size = getattr(small.task, name)
        setattr(small.task, name, min(size, ROWS) if size > 0 else ROWS)
    return small


def _own(field: str, name: str, call: Callable[[], T]) -> T:
    """``call``, which may be the user's own code.  Raises ConfigError for whatever it raises."""
    try:
        return call()
    except EXPECTED as error:
        ours = isinstance(error, EspalierError)
        raise ConfigError(told(error) if ours else f"{field}={name!r}: {told(error)}") from error
    except Exception as error:  # the user's own code
        raise ConfigError(f"{field}={name!r}: {type(error).__name__}: {error}") from error


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
        found = f"{_gib(free)} are free there, {what} {_gib(needed)}"
        yield Problem(field, found, "make room, or name a larger file system")


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def _checkpoint_bytes(config: Config) -> int:
    """Float32 weights that are trained, both of Adam's moments, and the models that are kept besides."""
    each = 12 + besides_saved(config.learn, config.model.dtype)
    return each * adapters.trained(config, _parameters(config))


def _parameters(config: Config) -> int:
    """Of the model; of one that is made here (a few megabytes) none."""
    try:
        return ModelShape.from_directory(config.model.path).parameters if config.model.path else 0
    except UnsupportedModel:
        return 0  # told by :func:`model`


# --- what only the machine that the run is on can tell ------------------------------------------------------


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
    for reward in rewards(config.reward):
        if url := reward.options.get("base_url"):
            asked[f"{reward.key}.options.base_url={url}"] = str(url)
        keys[f"{reward.key}.options.api_key_env"] = str(reward.options.get("api_key_env") or "")
    for field, name in keys.items():
        if name and not os.environ.get(name):
            yield Problem(f"{field}={name}", "this environment variable is not set, or empty", "export it")
    address = config.cluster.address
    if re.fullmatch(r"[^/]+:\d+", address):
        asked[f"cluster.address={address}"] = address
    for field, fault in unanswered(asked).items():
        yield Problem(field, f"does not answer ({fault})", "start it, or correct the address")
    if config.cluster.nodes > 1 and not _joins(config):
        found = "no Ray cluster is named, and this machine is one node"
        yield Problem(f"cluster.nodes={config.cluster.nodes}", found, "use submit, or set cluster.address")


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
            found = f"{_gib(free)} of memory are free, optimizer and checkpoint take {_gib(needed)}"
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


ANYWHERE: dict[str, Check] = {
    "parts": parts,
    "layout": layout,
    "model": model,
    "chat": chat,
    "task": task,
    "run directory": disk,
}
ON_THE_SPOT: dict[str, Check] = {
    "engine": engine,
    "servers": servers,
    "gpus": gpus,
    "ports": ports,
    "memory": memory,
    "scratch": scratch,
    "hub": upload,
    "views": lambda config: (Problem("", line) for line in views.unavailable(config)),
}
LATER = ", ".join(ON_THE_SPOT)  # for people who submit
IN_CONTAINER = ("model", "chat", "task")  # may lie elsewhere in one: paths are those of its mounts
