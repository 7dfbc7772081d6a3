"""What an agent does on average, as a plan counts on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from system.config import Config, ConfigError


@dataclass(frozen=True, slots=True)
class AgentWorkload:
    """What the agent does, on average per branch.  Guesses until a run has measured it."""

    prompt_tokens: float = 512.0
    response_tokens: float = 2048.0  # model and tool tokens after the prompt, of one leaf's path
    tool_share: float = 0.25  # of those, tokens that tools wrote
    calls: float = 2.0  # tool calls
    tool_s: float = 1.0  # seconds per call
    shared: float = 0.3  # share of a leaf's path that siblings have computed already

    @classmethod
    def guess(cls, config: Config) -> AgentWorkload:
        """Half the response budget and half the call limit, a prompt that leaves room for a response; sharing
        only where trees fork.
        """
        rollout, usual = config.rollout, cls()
        room = config.engine.max_context - rollout.max_response_tokens
        return replace(
            usual,
            prompt_tokens=min(usual.prompt_tokens, max(1.0, room)),
            response_tokens=rollout.max_response_tokens / 2,
            calls=rollout.call_limit / 2,
            shared=usual.shared if config.branching.name != "none" else 0.0,
        )

    def told(self, config: Config, **means: float | None) -> AgentWorkload:
        """With the means that are given, by name.  Raises :class:`ConfigError` for what no branch of
        ``config`` has on average.
        """
        rollout, context = config.rollout, config.engine.max_context
        response = rollout.max_response_tokens
        bounds = {
            "prompt_tokens": ("--prompt", 1.0, context, "engine.max_context"),
            "response_tokens": ("--response", 1.0, response, "rollout.max_response_tokens"),
            "calls": ("--calls", 0.0, rollout.call_limit, "rollout.call_limit"),
            "tool_s": ("--tool-s", 0.0, math.inf, ""),
        }
        given = {name: value for name, value in means.items() if value is not None}
        for name, value in given.items():
            option, least, most, setting = bounds[name]
            if not least <= value <= most or math.isinf(value):
                limit = f" to {setting}={most}, the most of any branch" if setting else " or more"
                raise ConfigError(f"{option} {value:g}: give a mean of {least:g}{limit}")
        made = replace(self, **given)
        if (tokens := made.prompt_tokens + made.response_tokens) > context:
            raise ConfigError(
                f"--prompt {made.prompt_tokens:g} and --response {made.response_tokens:g} are {tokens:g} "
                f"tokens, more than engine.max_context={context}: lower one of them, or raise that"
            )
        return made

    @property
    def generated(self) -> float:
        """Tokens that the model has to sample for one more leaf."""
        return self.response_tokens * (1 - self.tool_share) * (1 - self.shared)

    @property
    def packed(self) -> float:
        """Tokens that the learner computes for one more leaf; the prompt is counted with the tree."""
        return self.response_tokens * (1 - self.shared)
