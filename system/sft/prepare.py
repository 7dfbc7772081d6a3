"""Conversations as examples that fit, ready to be trained on."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from system.config import Config, PartConfig
from system.envs.make import make_environment
from system.rollout.chat import make_chat, planned_syntax
from system.rollout.encode import local_tokenizer
from system.sft.data import SplitData, unusable_lines
from system.sft.encode import Encoder
from system.sft.example import Example
from system.sft.forms import Conversation
from system.tasks.columns import RowUnusable
from system.tasks.files import DataError


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is trained on and what is held out, and what became of the rows."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    unusable: int  # rows
    too_long: int  # conversations that were left out
    cut: int  # conversations that end earlier
    digest: str  # of the tokens, and of which are learned

    def facts(self) -> dict[str, Any]:
        """In figures, as JSON."""
        return {
            "conversations": len(self.train),
            "held_out": len(self.held_out),
            "unusable": self.unusable,
            "too_long": self.too_long,
            "cut": self.cut,
            "tokens": sum(one.tokens.size for one in self.train),
            "learned_tokens": sum(one.learned for one in self.train),
            "digest": self.digest,
        }

    def told(self) -> str:
        """In a line, for people."""
        facts = self.facts()
        parts = [
            f"{facts['conversations']} conversations, {facts['held_out']} held out",
            f"{facts['tokens']} tokens, {facts['learned_tokens']} of them learned",
        ]
        counts = {"unusable": "unusable rows left out", "too_long": "too long", "cut": "cut"}
        parts += [f"{facts[key]} {what}" for key, what in counts.items() if facts[key]]
        return "; ".join(parts)


def learner_config(config: Config) -> Config:
    """What the learner is told: a supervised run needs none of the models that reinforcement learning keeps
    beside the one it trains.
    """
    told = copy.deepcopy(config)
    learn = told.learn
    learn.kl_coef, learn.proximal, learn.correction, learn.teacher = 0.0, "start", PartConfig("none"), "none"
    return told


def make_encoder(config: Config, model: Path) -> Encoder:
    """What encodes conversations as a rollout of ``config`` would have them.  Raises ``ConfigError``."""
    syntax = planned_syntax(config)
    environment = make_environment(config.environment)
    chat = make_chat(config, local_tokenizer(str(model)), str(model), syntax, environment)
    return Encoder(chat, syntax)


def prepare(
    config: Config, data: SplitData, model: Path, done: Callable[[int], object] = lambda _: None
) -> Prepared:
    """Encode all conversations of ``data``.  ``done``: hears how many are.

    Raises :class:`DataError` where more rows are unusable than ``sft.skip`` lets be, with the reasons, or
    none is left.
    """
    sft, encoder = config.sft, make_encoder(config, model)
    most = sft.max_tokens or config.engine.max_context
    faults = [*data.faults]
    counts = {"too_long": 0, "cut": 0}

    def encoded(conversations: Sequence[Conversation]) -> list[Example]:
        found: list[Example] = []
        for number, one in enumerate(conversations, 1):
            try:
                example = encoder.example(one)
            except RowUnusable as error:
                faults.append(str(error))
                continue
            fitting = example
            if example.tokens.size > most:
                fitting = example.cut(most) if sft.too_long == "cut" else None
                counts["cut" if fitting else "too_long"] += 1
            if fitting:
                found.append(fitting)
            if number % 256 == 0:
                done(number)
        return found

    train, held_out = encoded(data.train), encoded(data.held_out)
    rows = len(data.train) + len(data.held_out) + len(data.faults)
    if len(faults) > sft.skip * rows:
        raise DataError("\n".join(unusable_lines(sft.path, faults, rows, sft.skip)))
    if not train or (data.held_out and not held_out):
        where = "trained on" if not train else "held out"
        raise DataError(
            f"{sft.path}: no conversation that is {where} has {most} tokens or fewer: raise sft.max_tokens "
            "(and engine.max_context), or set sft.too_long=cut"
        )
    digest = _digest([*train, *held_out])
    return Prepared(train, held_out, len(faults), counts["too_long"], counts["cut"], digest)


def _digest(examples: Sequence[Example]) -> str:
    hashed = hashlib.sha256()
    for one in examples:
        for array in (one.tokens, one.start, one.kind):
            hashed.update(array.tobytes())
    return hashed.hexdigest()[:16]
