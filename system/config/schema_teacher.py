"""The section ``teacher`` of the configuration: on-policy distillation."""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field
from __future__ import annotations

from dataclasses import dataclass

from system.config.rule import setting


@dataclass
class TeacherConfig:
    """Who says of the tokens that were sampled how likely they should have been: on-policy distillation."""

    source: str = setting(
        "none",
        "server: a model that SGLang, or the embedded engine, serves at teacher.urls; average: the moving "
        "average of the weights that are trained (self-distillation); none: nobody",
        choices=("none", "server", "average"),
    )
    urls: list[str] = setting(
        [],
        "of servers of the same teacher, which reads our tokens: its tokenizer is the model's",
        safe_on_resume=True,
    )
    coef: float = setting(
        1.0,
        "weight of the reverse KL to the teacher beside the objective's loss; learn.credit=none leaves the "
        "rewards out",
        above=0,
        safe_on_resume=True,
    )
    decay: float = setting(0.99, "of the average, per optimizer step", least=0, most=1)
    deadline_s: float = setting(120.0, "one question to the server", above=0, safe_on_resume=True)
    concurrency: int = setting(
        32, "questions to one server at once, per rollout worker", least=1, safe_on_resume=True
    )
    api_key_env: str = setting(
        "", "environment variable that holds the key the servers want; empty: none", safe_on_resume=True
    )
