"""Reward rules by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from system import plugins
from system.config import Config
from system.rollout.reward import Reward

__all__ = ["make_reward"]


def make_reward(name: str, options: Mapping[str, Any] | None = None, config: Config | None = None) -> Reward:
    """The rule called ``name``, or one's own at ``package.module:Name``, made with ``options``.

    ``config`` goes to a rule with a parameter of that name.  Raises :class:`plugins.PluginError`.
    """
    return plugins.REWARDS.make(name, options or {}, config=config)
