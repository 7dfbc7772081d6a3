"""The questions of ``agent.run=verifiers``: tasks of a taskset, as its own interpreter lists them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from system.agents.verifiers.agent import COLUMN
from system.agents.verifiers.command import interpreter, questions, specification
from system.config import Config, ConfigError
from system.tasks.base import sizes
from system.text import as_text
from system.tree.prompt import Prompt

START_S = 120.0  # as of agent.options.start_s


class VerifiersTask:
    """The first ``task.eval_size`` tasks are held out, the others are trained on; or, with
    ``agent.options.held_out``, those of the taskset with these settings are held out.
    """

    name = "verifiers"

    def __init__(self, config: Config) -> None:
        """Raises ConfigError where no interpreter or environment is named."""
        agent = config.agent
        if agent.run != "verifiers":
            raise ConfigError("task.name=verifiers goes with agent.run=verifiers")
        options = agent.options
        self._agent, self._python = agent, interpreter(str(options.get("python", "")))
        self._apart = bool(options.get("held_out"))
        self._spec = specification(options.get("environment", ""), options.get("held_out"), agent.turns)
        self._within_s = float(options.get("start_s", START_S))
        self._train_size, self._eval_size = sizes(config)

    def train(self) -> list[Prompt]:
        return self._prompts[1]

    def eval(self) -> list[Prompt]:
        return self._prompts[0]

    @cached_property
    def _prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        """Held out, and trained on.  Raises ConfigError for whatever the other interpreter says."""
        if self._apart:
            return self._asked("eval", self._eval_size), self._asked("train", self._train_size)
        found = self._asked("train", self._eval_size + self._train_size)
        if self._eval_size and len(found) <= self._eval_size:
            raise ConfigError(
                f"task.eval_size={self._eval_size}: the taskset has only {len(found)} tasks, and none would "
                "be left to train on: lower it, or set agent.options.held_out"
            )
        return found[: self._eval_size], found[self._eval_size :]

    def _asked(self, split: str, most: int) -> list[Prompt]:
        if most == 0:
            return []
        found = questions(self._python, self._spec, split, most, self._agent, self._within_s)
        return [_prompt(f"{self.name}/{split}/{number}", split, one) for number, one in enumerate(found)]


def _prompt(key: str, split: str, task: dict[str, Any]) -> Prompt:
    """The question as it is shown; what is asked in truth, the environment says."""
    data: dict[str, Any] = task["data"]
    asked: Any = data.get("prompt")
    messages = asked if isinstance(asked, list) else [{"role": "user", "content": asked}] if asked else []
    if data.get("system_prompt"):
        messages = [{"role": "system", "content": data["system_prompt"]}, *messages]
    shown = tuple(
        {"role": str(one.get("role", "user")), "content": _text(one.get("content"))} for one in messages
    )
    return Prompt(
        id=key,
        messages=shown,
        answers=(),
        kind=str(data.get("name") or ""),
        extra={COLUMN: {"split": split, "data": data}},
    )


def _text(content: Any) -> str:
    """Of a message's content, as verifiers writes it down."""
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return as_text(str(content or ""))
