"""Questions for ``environment=gymnasium``: one for each seed that an episode may begin with."""

from __future__ import annotations

from system.config import Config, ConfigError
from system.tasks.base import sizes
from system.tree.prompt import Prompt

EVAL_SEED_OFFSET = 1_000_003


class GymTask:
    """Episodes of one environment; those of evaluation begin with other seeds."""

    name = "gymnasium"

    def __init__(self, config: Config, instructions: str = "") -> None:
        """``instructions``: what the model is told to do.  Raises ConfigError where there are none."""
        if config.environment.name != "gymnasium":
            raise ConfigError("task.name=gymnasium goes with environment.name=gymnasium")
        if not instructions:
            raise ConfigError("task.options.instructions: say what is to be done in the environment")
        self._id, self._instructions = str(config.environment.options.get("id", "")), instructions
        self._system, self._seed = config.task.system_prompt, config.run.seed
        self._sizes = sizes(config)

    def train(self) -> list[Prompt]:
        return self._prompts("train", self._sizes[0], self._seed * 10_000_019)

    def eval(self) -> list[Prompt]:
        return self._prompts("eval", self._sizes[1], self._seed * 10_000_019 + EVAL_SEED_OFFSET)

    def _prompts(self, split: str, n: int, first: int) -> list[Prompt]:
        system = ({"role": "system", "content": self._system},) if self._system else ()
        user = {"role": "user", "content": self._instructions}
        return [
            Prompt(f"{self._id}/{split}/{i}", (*system, user), (), self._id, {"seed": (first + i) % 2**31})
            for i in range(n)
        ]
