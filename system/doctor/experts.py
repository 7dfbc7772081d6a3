"""What a run and its model's mixtures of experts do not agree on."""

from __future__ import annotations

from collections.abc import Iterator

from system.config import Config
from system.learn.expert_layout import expert_problems
from system.models.shape import ModelShape


def expert_misfits(config: Config, shape: ModelShape) -> Iterator[str]:
    """A line each, with the remedy; none where all is well."""
    yield from expert_problems(shape, config.learn)
    if shape.experts and config.rollout.replay_routes and config.agent.on:
        yield (
            "rollout.replay_routes: of what an agent's model says, the experts are not recorded; set it to "
            "false: the learner then chooses them anew"
        )
