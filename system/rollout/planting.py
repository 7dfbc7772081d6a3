"""A tree with the world that its branches begin in, and what does not go with such a world."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from system.config import Config
from system.envs.live import TreeSessions
from system.envs.make import make_environment
from system.envs.protocol import Effects, ForkKind, WorldFailed
from system.models.directory import chat_template
from system.rollout.branching import make_policy
from system.rollout.chat import planned_syntax
from system.rollout.context import RolloutContext
from system.rollout.failure import RolloutFailed
from system.rollout.tree_rollout import TreeRollout
from system.tree.prompt import Prompt


async def planted(
    context: RolloutContext,
    prompt: Prompt,
    *,
    seed: int,
    ticket: int | str = "",
    greedy: bool = False,
    temperature: float | None = None,
    guide: int = 0,
) -> TreeRollout:
    """A :class:`TreeRollout` of these parameters, to be run.

    Where there is an environment, a world is opened first, and what it begins with joins the prompt.  An
    evaluation has an environment of its own.  Raises :class:`RolloutFailed`.
    """
    make = partial(
        TreeRollout, context, seed=seed, ticket=ticket, greedy=greedy, temperature=temperature, guide=guide
    )
    if context.environments is None:
        return make(prompt)
    service = context.environments.eval if greedy else context.environments.train
    sessions = TreeSessions(service, prompt, str(ticket) or prompt.id, seed)
    try:
        opening = await sessions.begin()
        return make(opened(prompt, opening), sessions=sessions)
    except BaseException as error:
        await sessions.close()
        if isinstance(error, WorldFailed):
            raise RolloutFailed(prompt.id, "environment", str(error)) from error
        raise


def opened(prompt: Prompt, opening: str) -> Prompt:
    """``prompt`` with what its world begins with, at the end of the last message, or as the only one."""
    if not opening:
        return prompt
    if not prompt.messages:
        return replace(prompt, messages=({"role": "user", "content": opening},))
    *before, last = prompt.messages
    content = f"{last['content']}\n\n{opening}" if last["content"] else opening
    return replace(prompt, messages=(*before, {**last, "content": content}))


def misfits(config: Config) -> Iterator[str]:
    """What the configured environment cannot go with, a line each with the remedy.

    Raises :class:`ConfigError` for one that cannot be had.
    """
    environment = make_environment(config.environment)
    if environment is None:
        return
    syntax, policy = planned_syntax(config), make_policy(config.branching)
    name = f"environment.name={config.environment.name!r}"
    if environment.forks == ForkKind.NONE and (policy.can_fork or policy.expands):
        yield (
            f"{name} cannot be forked, and branching={config.branching.name} forks: set branching=none, or "
            'say in the environment how it forks (of a plain class: fork = "deepcopy" or "replay")'
        )
    elif policy.expands and environment.effects == Effects.OUTSIDE:
        yield (
            f"{name} cannot be replayed, as its actions have effects outside, and "
            f"branching={config.branching.name} goes on from any turn of a tree: take another policy"
        )
    if config.guide.expert:
        yield (
            f"guide.expert={config.guide.expert:g}: an expert's turns are read, not done, so no world of "
            f"{name} is where they end: set guide.expert=0"
        )
    templated = bool(config.model.path and chat_template(config.model.path))
    own = syntax.new_turn or config.rollout.answers == "template"
    if environment.answers_messages and templated and not own:
        yield (
            f"{name} answers messages, and rollout.syntax={config.rollout.syntax.name} has no turns of a "
            "chat template for that: set rollout.answers=template, or take the syntax that the template "
            "teaches, such as hermes"
        )
