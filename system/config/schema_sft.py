"""The section ``sft`` of the configuration (:mod:`system.config.schema` has the others)."""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from system.config.rule import setting

FORMS = ("auto", "sharegpt", "messages", "completion", "alpaca")
_PASS = re.compile(r"pass@([1-9]\d{0,3})")


@dataclass
class SftConfig:
    """Supervised learning on conversations (``espalier sft``), with the learner of ``learn``."""

    path: str = setting(
        "", "conversations: a file (jsonl, json, parquet, csv; .gz), a directory or a glob", path=True
    )
    eval_path: str = setting("", "held-out conversations; empty: see eval_share", path=True)
    eval_share: float = setting(
        0.0, "share of the conversations of path that is held out, by their questions", least=0, most=0.5
    )
    form: str = setting(
        "auto",
        "sharegpt (conversations of from, value), messages (of role, content, tool_calls), completion "
        "(prompt, completion), alpaca (instruction, input, output); auto: by the columns of each row",
        choices=FORMS,
    )
    columns: dict[str, str] = setting(
        {},
        "columns that have other names than usual: {messages: …, system: …, tools: …, prompt: …, "
        "completion: …, instruction: …, input: …, output: …}",
    )
    skip: float = setting(
        0.0,
        "share of the rows that may be unusable and is left out; more end the run",
        least=0,
        most=1,
    )
    max_tokens: int = setting(0, "tokens of one conversation, at most; 0: engine.max_context", least=0)
    too_long: str = setting(
        "skip",
        "a longer one is left out (skip), or ends behind the last of the model's turns, or calls, that fits "
        "(cut); both are counted",
        choices=("skip", "cut"),
    )
    epochs: int = setting(3, "passes over the conversations", least=1)
    batch: int = setting(16, "conversations of one optimizer step", least=1)
    lr: float = setting(1e-5, "the highest learning rate", above=0)
    warmup: float = setting(0.1, "share of the steps over which the rate rises from 0", least=0, most=1)
    lr_decay: str = setting("cosine", "its course after that", choices=("constant", "linear", "cosine"))
    lr_end: float = setting(0.0, "where it ends, as a share of sft.lr", least=0, most=1)
    eval_every: int = setting(
        0,
        "steps between looks at the held-out loss; 0: after each epoch",
        least=0,
        safe_on_resume=True,
    )
    candidate_every: int = setting(
        0, "steps between the models that one is chosen of; 0: one at the end of each epoch", least=0
    )
    choose: str = setting(
        "auto",
        "which model is the result: last; loss (the lowest held-out loss); pass@k (most held-out questions "
        "of task that one of k samples at rollout.temperature answers right); auto: loss where conversations "
        "are held out, else last",
        safe_on_resume=True,
    )
    keep: str = setting(
        "chosen", "which models stay when one is chosen", choices=("chosen", "all"), safe_on_resume=True
    )

    @property
    def samples(self) -> int:
        """k of ``choose=pass@k``; 0 for another choice."""
        found = _PASS.fullmatch(self.choose)
        return int(found[1]) if found else 0

    @property
    def holds_out(self) -> bool:
        """Whether there are held-out conversations."""
        return bool(self.eval_path or self.eval_share)


def sft_problems(sft: SftConfig) -> Iterator[str]:
    """What does not agree in the section."""
    if sft.choose not in ("auto", "last", "loss") and not sft.samples:
        yield f"sft.choose={sft.choose!r}: choose auto, last, loss or pass@k, for example pass@4"
    if sft.eval_path and sft.eval_share:
        yield "sft.eval_path and sft.eval_share both hold conversations out: take one of them"
    if sft.choose == "loss" and not sft.holds_out:
        yield "sft.choose=loss needs held-out conversations: set sft.eval_path or sft.eval_share"
