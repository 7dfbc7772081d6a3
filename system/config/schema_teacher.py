"""The section ``teacher`` of the configuration: the servers of on-policy distillation."""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field
from __future__ import annotations

from dataclasses import dataclass

from system.config.rule import setting


@dataclass
class TeacherConfig:
    """The servers that ``learn.teacher=server`` asks.  Any of it may change on resume."""

    urls: list[str] = setting(
        [],
        "of servers (SGLang's, or the embedded engine's) of one teacher, whose tokenizer is the model's",
        safe_on_resume=True,
    )
    deadline_s: float = setting(120.0, "one question", above=0, safe_on_resume=True)
    concurrency: int = setting(
        32, "questions to one server at once, per rollout worker", least=1, safe_on_resume=True
    )
    api_key_env: str = setting(
        "", "environment variable that holds the key the servers want; empty: none", safe_on_resume=True
    )
