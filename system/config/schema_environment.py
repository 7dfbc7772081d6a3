"""The configuration's section on environments: worlds with state, in which branches act and which fork."""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from system.config.rule import setting
from system.plugins import ENVIRONMENTS


@dataclass
class EnvironmentConfig:
    """What keeps a state between a branch's calls, and the limits around it."""

    name: str = setting(
        "tools", "tools: none, the tools of tools.names keep no state; or one's own", registry=ENVIRONMENTS
    )
    options: dict[str, Any] = setting({}, "the environment's own options")
    turn_limit: int = setting(
        8, "messages of one branch that the environment answers; the next ends the branch", least=0
    )
    concurrency: int = setting(
        64, "things that worlds do at once, per rollout worker", least=1, safe_on_resume=True
    )
    open_s: float = setting(30.0, "seconds to open a world", above=0, safe_on_resume=True)
    step_s: float = setting(
        20.0,
        "seconds for one action; later, the model is told so, and the world is built again without it",
        above=0,
        safe_on_resume=True,
    )
    fork_s: float = setting(
        10.0, "seconds to copy or save a world; later, replay does it", above=0, safe_on_resume=True
    )
    result_s: float = setting(
        10.0, "seconds for a world's final state; later, the leaf is unscored", above=0, safe_on_resume=True
    )
    close_s: float = setting(
        10.0, "seconds to close a world; later, it is left as it is", above=0, safe_on_resume=True
    )
    replay_s: float = setting(
        60.0,
        "seconds that the actions of a world took which a fork would replay; a dearer fork is given up",
        above=0,
        safe_on_resume=True,
    )
    retries: int = setting(
        2,
        "further attempts to open a world, and at an action that did not arrive, or may be sent again",
        least=0,
        safe_on_resume=True,
    )
