"""What one run of an agent said and was told: pieces of token paths, exactly as the engine sampled them.

An agent of somebody else's speaks to an endpoint in messages.  Each request becomes a path of tokens; where a
request goes on from what the session holds already, it shares those pieces, and where the agent has
rewritten its history, the path branches off.  So a session is a forest: pieces that are only ever added.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from system.tree.record import Float32, Int32, Kind, Outcome


@dataclass(slots=True)
class Piece:
    """A node of a forest: tokens of one author.  Its parent stands before it."""

    parent: int  # -1: it starts a chain of its own
    kind: Kind  # TOOL for everything not sampled (the first request's text too), MODEL for a turn
    tokens: Int32  # [t]
    logprob: Float32  # [t] of a MODEL piece, else [0]: behaviour log-probability, nats
    entropy: Float32  # [t] likewise: of the sampling distribution, nats; NaN where unknown
    version: Int32  # [t] likewise: weight version that sampled the token
    trained: bool  # the answer was handed out completely, and by the trained model's name
    reward: float = 0.0  # of this turn, set by the task's function


class Forest:
    """One session's pieces.  Pieces are added and never taken away or changed."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def add_context(self, parent: int, tokens: Int32) -> int:
        """Add what the model was told, below ``parent`` (-1: a chain of its own); its number.

        Raises ValueError for no tokens, and for a parent that there is not.
        """
        none, no_version = np.empty(0, np.float32), np.empty(0, np.int32)
        return self._add(Piece(parent, Kind.TOOL, tokens, none, none, no_version, trained=False))

    def add_turn(
        self,
        parent: int,
        tokens: Int32,
        logprob: Float32,
        entropy: Float32,
        version: Int32,
        *,
        trained: bool,
    ) -> int:
        """Add what the model said below ``parent``, all arrays [t] as the engine gave them; its number.

        Raises ValueError for no tokens, for arrays of other lengths, and for a parent that there is not.
        """
        if any(len(array) != len(tokens) for array in (logprob, entropy, version)):
            raise ValueError("a turn needs a log-probability, an entropy and a version for each token")
        if parent < 0:
            raise ValueError("a turn needs what it answers")
        return self._add(Piece(parent, Kind.MODEL, tokens, logprob, entropy, version, trained))

    def path(self, piece: int) -> list[int]:
        """The pieces from the start of the chain to ``piece``, in order."""
        numbers: list[int] = []
        while piece >= 0:
            numbers.append(piece)
            piece = self.pieces[piece].parent
        return numbers[::-1]

    def tokens(self, piece: int) -> Int32:
        """The token ids [P] from the start of the chain to the end of ``piece``."""
        return np.concatenate([self.pieces[number].tokens for number in self.path(piece)])

    def children(self, piece: int) -> list[int]:
        """The pieces right below ``piece`` (-1: those that start a chain), in the order they came."""
        return [number for number, one in enumerate(self.pieces) if one.parent == piece]

    def ends(self) -> list[int]:
        """Pieces without children, in the order they came."""
        inner = {piece.parent for piece in self.pieces}
        return [number for number in range(len(self.pieces)) if number not in inner]

    def _add(self, piece: Piece) -> int:
        if not len(piece.tokens):
            raise ValueError("a piece needs tokens")
        if not -1 <= piece.parent < len(self.pieces):
            raise ValueError(f"there is no piece {piece.parent}")
        self.pieces.append(piece)
        return len(self.pieces) - 1


@dataclass(frozen=True, slots=True)
class AgentCall:
    """A tool call of the model, and what the agent's next request says that came of it."""

    piece: int  # the context piece that tells the answer
    tool: str
    arguments: dict[str, Any]
    text: str  # the answer


@dataclass(slots=True)
class Episode:
    """One run of the agent, closed."""

    key: str  # of the session
    seed: int
    prompt_id: str  # identity of the prompt in the ledger
    forest: Forest
    # ENDED when the agent finished by itself; DEADLINE, LENGTH, TURN_LIMIT; ENVIRONMENT: it failed
    outcome: Outcome
    chosen: list[int]  # the ends that count
    reward: float = float("nan")  # nan: not scored
    correct: int = -1  # 1 right, 0 wrong, -1 not scored
    parts: dict[str, float] = field(default_factory=dict[str, float])  # of the reward
    result: dict[str, Any] = field(default_factory=dict[str, Any])  # what the user's function gave
    calls: list[AgentCall] = field(default_factory=list[AgentCall])
    rewrites: int = 0  # requests that did not go on from what was said before
    retries: int = 0  # requests answered with what an earlier one had sampled
    counters: dict[str, int] = field(default_factory=dict[str, int])


def trained_ends(forest: Forest) -> list[int]:
    """The ends of ``forest`` whose path holds a turn that is trained on."""
    return [end for end in forest.ends() if any(forest.pieces[number].trained for number in forest.path(end))]
