"""Demonstrations as trees, so that the supervised warm start uses the learner's one way of reading."""

from __future__ import annotations

import numpy as np

from system.rollout.chat import Chat
from system.rollout.encode import encode_text
from system.tasks.base import Demonstration
from system.tree.builder import TreeBuilder
from system.tree.record import Kind, Origin, Outcome, Tree


def demonstration_tree(demo: Demonstration, chat: Chat) -> Tree:
    """A tree of one leaf (STOPPED, reward 1) whose MODEL nodes are what a warm start imitates.

    The prompt is told as ``chat`` tells it; the last model segment ends with the token that ends a turn.
    Log-probabilities are 0 and versions 0: nothing sampled these tokens.  Raises ValueError for a segment
    that is neither "model" nor "tool", is empty, or for a demonstration whose last segment is not the
    model's.
    """
    if chat.end is None:
        raise ValueError("the tokenizer has no token that ends the model's turn")
    if not demo.segments or demo.segments[-1][0] != "model":
        raise ValueError(f"demonstration {demo.prompt.id!r} must end with a segment of the model")
    growth = TreeBuilder(demo.prompt.id, demo.prompt.kind, chat.encode(demo.prompt.messages), budget=1)
    node = growth.prompt
    last = len(demo.segments) - 1
    for i, (author, text) in enumerate(demo.segments):
        if author not in ("model", "tool"):
            raise ValueError(f"demonstration {demo.prompt.id!r}, segment {i}: unknown author {author!r}")
        tokens = encode_text(chat.tokenizer, text)
        if not tokens.size:
            raise ValueError(f"demonstration {demo.prompt.id!r}, segment {i} is empty")
        if author == "tool":
            node = growth.node(node, Kind.TOOL)
            growth.extend(node, tokens)
        else:
            node = growth.node(node, Kind.MODEL)
            if i == last:
                tokens = np.append(tokens, np.int32(chat.end))
            growth.extend(node, tokens, logprob=0.0, version=0)
    growth.score(growth.leaf(node, Outcome.STOPPED, Origin.ROOT), 1.0, correct=True)
    return growth.close(now=0.0)
