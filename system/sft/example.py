"""A conversation as tokens, and as the tree of one path that the learner trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from system.tree.record import Int8, Int32, Kind, Origin, Outcome, Tree


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """T tokens in J nodes: the prompt, then what the model says (MODEL) and what others say (TOOL) in turn.

    Exactly the MODEL nodes are learned.
    """

    where: str  # what it was made of
    task: str  # kind of question, for metrics
    tokens: Int32  # [T]
    start: Int32  # [J] index of each node's first token
    kind: Int8  # [J]

    @classmethod
    def of(cls, where: str, nodes: Sequence[tuple[Kind, Int32]], task: str = "sft") -> Example:
        """Of nodes in order; neighbours of one kind (answers of two tools) become one, empty ones go."""
        kinds: list[Kind] = []
        parts: list[Int32] = []
        for kind, tokens in nodes:
            if not tokens.size:
                continue
            if kinds and kinds[-1] == kind:
                parts[-1] = np.concatenate([parts[-1], tokens])
            else:
                kinds.append(kind)
                parts.append(tokens)
        size = np.array([part.size for part in parts], np.int64)
        tokens = np.concatenate(parts).astype(np.int32)
        return cls(where, task, tokens, (np.cumsum(size) - size).astype(np.int32), np.array(kinds, np.int8))

    @property
    def end(self) -> Int32:
        """[J] one past each node's last token."""
        return np.append(self.start[1:], np.int32(self.tokens.size)).astype(np.int32)

    @property
    def learned(self) -> int:
        """Tokens that are learned."""
        return int((self.end - self.start)[self.kind == Kind.MODEL].sum())

    def cut(self, most: int) -> Example | None:
        """Up to the last MODEL node that ends within ``most`` tokens; None where none does."""
        fits = np.flatnonzero((self.kind == Kind.MODEL) & (self.end <= most))
        if not fits.size:
            return None
        nodes = int(fits[-1]) + 1
        size = int(self.end[nodes - 1])
        return replace(self, tokens=self.tokens[:size], start=self.start[:nodes], kind=self.kind[:nodes])

    def tree(self) -> Tree:
        """A tree of one leaf (STOPPED, reward 1).  Log-probabilities and versions of the MODEL tokens are 0:
        nothing sampled them.
        """
        count, nodes = self.tokens.size, self.kind.size
        learned = np.repeat(self.kind == Kind.MODEL, self.end - self.start)
        return Tree(
            prompt_id=self.where,
            task=self.task,
            tokens=self.tokens,
            logprob=np.zeros(count, np.float32),
            entropy=np.full(count, np.nan, np.float32),
            version=np.where(learned, 0, -1).astype(np.int32),
            start=self.start,
            parent=np.arange(-1, nodes - 1, dtype=np.int32),
            kind=self.kind,
            leaf=np.array([nodes - 1], np.int32),
            reward=np.ones(1, np.float32),
            correct=np.ones(1, np.int8),
            outcome=np.array([Outcome.STOPPED], np.int8),
            origin=np.array([Origin.ROOT], np.int8),
            budget=1,
        )
