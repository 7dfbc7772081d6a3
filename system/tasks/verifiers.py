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
        train, held_out = self._train_size, self._eval_size
        wanted = {"train": train, "eval": held_out} if self._apart else {"train": train + held_out}
        tasks = questions(self._python, self._spec, wanted, self._agent, self._within_s)
        for split, most in wanted.items():
            if most and not tasks[split]:
                field = "held_out" if split == "eval" else "environment"
                raise ConfigError(
                    f"agent.options.{field}: the taskset has no tasks with these settings: its load() "
                    "yields none; correct them, or the taskset"
                )
        kind = str(self._spec["train"]["taskset"]["id"])
        found = {
            split: [_prompt(f"{kind}/{split}/{i}", kind, split, one) for i, one in enumerate(tasks[split])]
            for split in wanted
        }
        if self._apart:
            return found["eval"], found["train"]
        if held_out and len(found["train"]) <= held_out:
            raise ConfigError(
                f"task.eval_size={held_out}: the taskset has only {len(found['train'])} tasks, and none "
                "would be left to train on: lower it, or set agent.options.held_out"
            )
        return found["train"][:held_out], found["train"][held_out:]


def _prompt(key: str, kind: str, split: str, task: dict[str, Any]) -> Prompt:
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
        kind=kind,
        extra={COLUMN: {"split": split, "data": data}},
    )


def _text(content: Any) -> str:
    """Of a message's content, as verifiers writes it down."""
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return as_text(str(content or ""))
