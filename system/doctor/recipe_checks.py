"""Checks of a recipe: its parts, its layout, and the model that it names.

They are the same on every machine that sees the same files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from system.agents.forking import misfits as agent_misfits
from system.cluster.placement import paper_nodes, place
from system.config import Config, truncated
from system.config.check import part_problems, undivided
from system.doctor import adapters
from system.doctor.experts import expert_misfits
from system.doctor.problem import Problem
from system.doctor.sglang_model import sglang_misfits
from system.envs.make import make_environment
from system.learn.sizes import context_block
from system.models import directory
from system.models.known import shape_of
from system.models.reading import UnsupportedModel
from system.models.shape import ModelShape
from system.plugins import POLICIES
from system.rollout.branching import make_policy
from system.rollout.chat import make_chat, planned_syntax, unknown_arguments
from system.rollout.encode import local_tokenizer
from system.rollout.planting import misfits


def parts(config: Config) -> Iterator[Problem]:
    """The parts picked by name: can they be imported, do they take their options?"""
    problems = part_problems(config)
    yield from (Problem("", problem) for problem in problems)
    if problems:
        return
    if config.branching.options or config.branching.name not in POLICIES.table:
        make_policy(config.branching)
    yield from (Problem("", line) for line in (*misfits(config), *agent_misfits(config)))


def sampling(config: Config) -> Iterator[Problem]:
    """Are training's samples of the whole distribution?"""
    if why := truncated(config):
        yield Problem("", why)


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
