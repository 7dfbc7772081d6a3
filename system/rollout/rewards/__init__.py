"""Reward rules by name."""

from __future__ import annotations

from collections.abc import Callable

from system import plugins
from system.rollout.reward import Reward
from system.rollout.rewards.arpo import ArpoReward
from system.rollout.rewards.arpo_release import ArpoReleaseReward

REWARDS: dict[str, Callable[[], Reward]] = {
    "arpo": ArpoReward,
    "arpo-release": ArpoReleaseReward,
}

__all__ = ["REWARDS", "ArpoReleaseReward", "ArpoReward", "make_reward"]


def make_reward(name: str) -> Reward:
    """The rule called ``name``, or one's own at ``package.module:Name`` (made without arguments).

    Raises ``ValueError`` for an unknown one; ``task`` is the task's own to give.
    """
    if plugins.is_path(name):
        try:
            return plugins.load(name)()
        except plugins.PluginError as error:
            raise ValueError(f"reward.name={name!r}: {error}") from error
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}: choose one of {', '.join(REWARDS)}")
    return REWARDS[name]()
