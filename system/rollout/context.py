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

from system.rollout.branching import Never
from system.rollout.parts import RolloutParts
from system.rollout.schedule import BarrierFree
from system.rollout.tree_rollout import Begun, RolloutFailed, TreeRollout
from system.tree.prompt import Prompt

__all__ = ["RolloutContext", "RolloutFailed"]


class RolloutContext(RolloutParts):
    """Grows trees, any number at once."""

    def plant(
        self,
        prompt: Prompt,
        *,
        seed: int,
        ticket: int | str = "",
        n: int | None = None,
        greedy: bool = False,
        temperature: float | None = None,
        begun: Begun | None = None,
    ) -> TreeRollout:
        """A tree of ``prompt`` that grows, and has its leaves scored, in its ``run()``.

        ``seed`` (≥ 0) drives sampling and branching: every branch has its own streams, so what a branch draws
        does not depend on the order of events.  ``ticket`` names this attempt (in ``meta`` and as the
        engine's route).  ``n`` overrides the leaf budget.  ``greedy`` is evaluation: one leaf (or ``n``), no
        forks, no barriers, temperature 0 unless ``temperature`` says otherwise.  ``begun``: what it has come
        to already (see :mod:`system.rollout.snapshot`); None for a new one.
        """
        if temperature is None:
            temperature = 0.0 if greedy else self.config.temperature
        return TreeRollout(
            parts=self,
            prompt=prompt,
            policy=Never(self.policy.probe_tokens) if greedy else self.policy,
            schedule=BarrierFree() if greedy else self.schedule,
            budget=n if n is not None else 1 if greedy else self.config.leaves,
            temperature=temperature,
            seed=seed,
            ticket=ticket,
            begun=begun,
        )
