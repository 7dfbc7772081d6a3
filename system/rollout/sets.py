"""What answers to the questions of ``eval.sets`` are made and scored with, where that is not the run's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from system.config import Config, eval_sets, scored
from system.http import Keys
from system.rollout.chat import make_chat
from system.rollout.context import RolloutContext
from system.rollout.scoring import Scoring


def scored_by(config: Config) -> dict[str, tuple[str, Config]]:
    """Of each set that is scored by others than the run's rewards: where these stand, and the configuration
    that has them.  Raises :class:`ConfigError`.
    """
    found = [(one, scored(config, one)) for one in eval_sets(config.eval)]
    return {one.name: (f"{one.key}.reward", own) for one, own in found if own is not None}


def scorings(
    config: Config, secret: Callable[[str], str | None], store: Path | None = None
) -> dict[str, Scoring]:
    """By set, as of :meth:`.Scoring.of`: what they count and how they fail is no part of the run's."""
    return {
        name: Scoring.of(own, secret, store, key=key, told_as=f"reward/eval/{name}")
        for name, (key, own) in scored_by(config).items()
    }


def contexts(
    config: Config, context: RolloutContext, model_path: str, keys: Keys, store: Path | None = None
) -> dict[str, RolloutContext]:
    """By set, as of :func:`.build_context`, whose ``context`` is the run's: another scoring, and another form
    of an answer that the model is told.
    """
    world = context.environments.eval.environment if context.environments else None
    of_sets, found = scored_by(config), dict[str, RolloutContext]()
    for name, scoring in scorings(config, keys.rewards.get, store).items():
        told = replace(config, reward=of_sets[name][1].reward)
        chat = make_chat(told, context.tokenizer, model_path, context.syntax, world)
        found[name] = replace(context, scoring=scoring, asks=chat)
    return found
