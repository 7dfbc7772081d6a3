"""A task's demonstrations, which the warm start of a model made here imitates: examples like any others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from system.config import Config, ConfigError
from system.learn.schedule import warm_start_lr
from system.models.families import family_of
from system.rollout.chat import Chat, make_chat, planned_syntax
from system.rollout.encode import encode_text, local_tokenizer
from system.sft.course import batches
from system.sft.example import Example
from system.tasks.base import Demonstration, HasDemonstrations, Task
from system.tree.record import Kind, Tree

_AUTHORS = {"model": Kind.MODEL, "tool": Kind.TOOL}

# Of `warmstart.lr`, for a new model without norms of queries and keys.  Adam moves every weight by about the
# rate, however small its gradient; a norm bounds what that does to the attention logits, and without one they
# probably overshoot.  The quickstart's Llama ends at a loss of 0.064 so, and at 0.082 with the whole rate.
UNNORMED_RATE = 0.5


def demonstration_tree(demo: Demonstration, chat: Chat) -> Tree:
    """A tree of one leaf whose MODEL nodes are what a warm start imitates.

    The prompt is told as ``chat`` tells it; the last model segment ends with the token that ends a turn.
    Raises ValueError for a segment that is neither "model" nor "tool", is empty, or for a demonstration whose
    last segment is not the model's.
    """
    if chat.end is None:
        raise ValueError("the tokenizer has no token that ends the model's turn")
    if not demo.segments or demo.segments[-1][0] != "model":
        raise ValueError(f"demonstration {demo.prompt.id!r} must end with a segment of the model")
    nodes = [(Kind.PROMPT, chat.encode(demo.prompt.messages))]
    for i, (author, text) in enumerate(demo.segments):
        if author not in _AUTHORS:
            raise ValueError(f"demonstration {demo.prompt.id!r}, segment {i}: unknown author {author!r}")
        tokens = encode_text(chat.tokenizer, text)
        if not tokens.size:
            raise ValueError(f"demonstration {demo.prompt.id!r}, segment {i} is empty")
        nodes.append((_AUTHORS[author], tokens))
    nodes.append((Kind.MODEL, np.array([chat.end], np.int32)))
    return Example.of(demo.prompt.id, nodes, demo.prompt.kind).tree()


def demonstrations(config: Config, task: Task, model: Path) -> list[Tree]:
    """The task's demonstrations as single-leaf trees, some 4 kB each.

    Raises ConfigError for one that :func:`demonstration_tree` refuses.
    """
    assert isinstance(task, HasDemonstrations)
    chat = make_chat(config, local_tokenizer(str(model)), str(model), planned_syntax(config))
    made = task.demonstrations(config.warmstart.demos, config.run.seed)
    try:
        return [demonstration_tree(one, chat) for one in made]
    except ValueError as error:
        remedy = "correct the task's demonstrations, or set warmstart.steps=0"
        raise ConfigError(f"task.name={config.task.name}: {error}; {remedy}") from error


def peak_lr(config: Config) -> float:
    """The highest learning rate of the warm start: ``warmstart.lr``, or ``UNNORMED_RATE`` of it where a model
    is made here whose queries and keys no norm bounds.
    """
    bounded = bool(config.model.path) or family_of(config.model.family).qk_norm
    return config.warmstart.lr * (1.0 if bounded else UNNORMED_RATE)


def warm_start(config: Config, demonstrations: Sequence[Tree]) -> Iterator[tuple[list[Tree], float]]:
    """The batches of the warm start and the learning rate of each, in an order by the run's seed."""
    settings, peak = config.warmstart, peak_lr(config)
    order = batches(len(demonstrations), settings.steps, settings.batch, config.run.seed)
    for step, rows in enumerate(order):
        yield [demonstrations[i] for i in rows], warm_start_lr(step, settings.steps, peak)
