"""The rollout: one tree from a prompt, one asyncio task per live branch.

A branch generates until it stops; if it stopped at a tool call the tool runs, its answer is appended, and
the branch generates on.  Tokens stream in with their entropies, so once the k-th token after a tool's answer
is there the policy decides; a fork is a new task at the end of that TOOL node, while the parent's
generation, which no one stopped, goes on.

The budget is exact: roots + forks + top-ups == n at every normal close.  N roots start together, forks draw
on n - N, and as soon as no live branch can bring another fork the rest starts as fresh roots, all at once.

That is the barrier-free schedule, in which nobody waits for anybody; ``rollout.schedule: lockstep`` is the
baseline (:mod:`system.rollout.schedule`).  The growing itself stands in :mod:`system.rollout.tree_rollout`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from system.config import RolloutConfig
from system.engine.protocol import Engine
from system.rollout.branching import Never, Policy
from system.rollout.encode import Tokenizer, encode_text
from system.rollout.reward import Reward
from system.rollout.schedule import BarrierFree, Schedule, make_schedule
from system.rollout.syntax import Syntax
from system.rollout.tree_rollout import RolloutFailed, TreeRollout
from system.tools.outcome import Tools
from system.tree.prompt import Prompt
from system.tree.record import Int32, Tree

__all__ = ["RolloutContext", "RolloutFailed"]

CHARS_PER_TOKEN = 32  # a tool's answer is cut to this many characters per allowed token before it is encoded


@dataclass(frozen=True)
class RolloutContext:
    """Grows trees, any number at once; what it knows of them all is only where their schedule stands."""

    engine: Engine
    tools: Tools
    syntax: Syntax
    policy: Policy
    reward: Reward
    tokenizer: Tokenizer
    config: RolloutConfig
    vocab_size: int  # V, of which ln V is the unit of entropy
    now: Callable[[], float] = time.time  # unix time, for the record
    schedule: Schedule = field(init=False)  # config.schedule, over all trees

    def __post_init__(self) -> None:
        wrapping = sum(tokens.size for tokens in self._wrapping)
        if self.config.max_tool_result_tokens <= wrapping:
            raise ValueError(
                f"rollout.max_tool_result_tokens={self.config.max_tool_result_tokens}: "
                f"the result's own tags take {wrapping} tokens"
            )
        object.__setattr__(self, "schedule", make_schedule(self.config.schedule))

    @cached_property
    def _wrapping(self) -> tuple[Int32, Int32]:
        """Tokens before and after a tool's answer."""
        before, after = self.syntax.result_open, self.syntax.result_close
        return encode_text(self.tokenizer, before), encode_text(self.tokenizer, after)

    async def grow(
        self,
        prompt: Prompt,
        *,
        seed: int,
        ticket: int | str = "",
        n: int | None = None,
        greedy: bool = False,
        temperature: float | None = None,
    ) -> Tree:
        """Grow one tree from ``prompt`` and score its leaves.

        ``seed`` (≥ 0) drives sampling and branching: every branch has its own streams, so what a branch draws
        does not depend on the order of events.  ``ticket`` names this attempt (in ``meta`` and as the
        engine's route).  ``n`` overrides the leaf budget.  ``greedy`` is evaluation: one leaf (or ``n``), no
        forks, no barriers, temperature 0 unless ``temperature`` says otherwise.

        Raises :class:`RolloutFailed` when fewer than min(2, n) leaves are scored, ``EntropyUnknown`` when
        the policy needs entropies that the engine does not give.  Cancelling it cancels every branch and
        aborts its request.
        """
        budget = n if n is not None else 1 if greedy else self.config.leaves
        if temperature is None:
            temperature = 0.0 if greedy else self.config.temperature
        policy = Never(self.policy.probe_tokens) if greedy else self.policy
        schedule = BarrierFree() if greedy else self.schedule
        growing = TreeRollout(self, prompt, policy, schedule, budget, temperature, seed, ticket)
        return await growing.run()

    def plant(self, prompt: Prompt, *, seed: int, ticket: int | str = "") -> TreeRollout:
        """A training tree that grows in its ``run()``; see :mod:`system.rollout.snapshot`."""
        config = self.config
        return TreeRollout(
            self, prompt, self.policy, self.schedule, config.leaves, config.temperature, seed, ticket
        )

    def encode_result(self, text: str, room: int) -> Int32:
        """Token ids of a tool's answer in its tags, at most ``room`` and ``max_tool_result_tokens``."""
        limit = self.config.max_tool_result_tokens
        before, after = self._wrapping
        inner = encode_text(self.tokenizer, text[: limit * CHARS_PER_TOKEN], trusted=False)
        return np.concatenate([before, inner[: limit - before.size - after.size], after])[:room]
