"""Branching policies: when a branch comes back from a tool unsure, does the tree fork there?

Pure: numpy only, no I/O.  A policy says what it measures (``probe_tokens``, ``lag``,
:meth:`Policy.measure`) and what follows from it (:meth:`Policy.decide`); the rollout does the collecting and
the forking.

Sources: ARPO, arXiv 2507.19849 (section 3.1) for the rule; the released ARPO code for ``arpo-release``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from system.config import BranchingConfig
from system.errors import ConfigError
from system.plugins import POLICIES, PluginError
from system.rollout.recent import Recent


def _nothing() -> NDArray[np.float32]:
    return np.zeros(0, np.float32)


class EntropyUnknown(ConfigError):
    """The engine reports no token entropies, and the configured policy needs them: so for every tree."""


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """What was measured around one tool result, in the unit of the policy's :meth:`Policy.measure`."""

    entropy: float  # H_t; NaN when unknown
    baseline: float  # H_init of the branch; NaN when unknown
    # [≤ probe_tokens] nats, of each token that was looked at; NaN where unknown
    entropies: NDArray[np.float32] = field(default_factory=_nothing)
    logprobs: NDArray[np.float32] = field(default_factory=_nothing)  # of the same tokens, nats
    # Of each sibling, a branch that goes on from the same result: the share of its first tokens, as many as
    # both have written and at most probe_tokens, before the first at which it differs from this one.
    shared: tuple[float, ...] = ()

    @property
    def delta_h(self) -> float:
        return self.entropy - self.baseline


@dataclass(frozen=True, slots=True)
class TreeState:
    """Where the tree stands at a decision."""

    budget: int  # n, leaves this tree may have
    started: int  # branches started so far: roots + forks + top-ups
    live: int  # branches not yet ended, this one included
    forks: int  # forks so far
    calls: int  # tool calls on this branch's path
    call_limit: int
    streak: int = 0  # tool results in a row, the last ones on this branch's path, at which the tree forked


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """What the model wrote in one go, in a tree in which no branch lives."""

    surprise: float  # -mean log-probability of its tokens, nats: an estimate of its entropy
    siblings: int  # turns that begin where it does, itself included
    calls: int  # tool calls before it on its path
    root: int = 0  # number of the root branch that it grew from
    logprobs: NDArray[np.float32] = field(default_factory=_nothing)  # [n] of its tokens, nats
    rewrites: bool = False  # it was written once more, from where an older turn, or its rest, begins


@dataclass(frozen=True, slots=True)
class Decision:
    """What a policy decided.  ``forks`` may exceed what the budget allows: the rollout caps it."""

    forks: int
    probability: float  # chance of a fork under the policy's formula
    draw: float  # the uniform draw compared with it; NaN when none was made
    delta_h: float  # ΔH = H_t - H_init


@dataclass(frozen=True)
class Policy(ABC):
    """How a tree branches.  A user's own is named ``branching=package.module:Name``.

    ``probe_tokens``: tokens at the start of a model segment that are measured.  Constructor parameters are
    the policy's options (``branching.options``); ``probe_tokens``, ``alpha``, ``beta`` and ``tau`` it gets
    from ``branching``, if it has parameters of these names.
    """

    probe_tokens: int

    name: ClassVar[str] = ""  # in errors; empty: the class's
    lag: ClassVar[bool] = False  # decide by the segment before the result (at once), not by the one after it
    inherits: ClassVar[bool] = True  # a fork keeps its parent's baseline, or its own first segment gives one
    can_fork: ClassVar[bool] = True  # if not, all n roots start together
    expands: ClassVar[bool] = False  # once all branches have ended, :meth:`expand` says where to go on
    lends: ClassVar[bool] = True  # a schedule may fork where the policy does not (:meth:`Schedule.lent`)

    def measure(self, entropies: NDArray[np.float32], log_vocab: float) -> float:
        """H = mean token entropy / ln V: 0 is certain, 1 uniform over the vocabulary.

        ``entropies``: [≤ probe_tokens] nats, NaN where unknown (left out); ``log_vocab``: ln V.  NaN when
        none is known.
        """
        known = entropies[np.isfinite(entropies)]
        return float(known.mean(dtype=np.float64)) / log_vocab if known.size else math.nan

    @property
    def asks_forks(self) -> bool:
        """Whether a fork, once its own first tokens are there, is decided upon as its parent was."""
        return False

    @abstractmethod
    def decide(self, probe: Probe, state: TreeState, rng: np.random.Generator) -> Decision:
        """Raises :class:`EntropyUnknown` when the policy needs ΔH and there is none."""

    def expand(
        self, turns: Sequence[Turn], room: int, rng: np.random.Generator
    ) -> Sequence[int | tuple[int, int]]:
        """Which of ``turns`` are written once more now, each by a new branch: indices, perhaps repeated, of
        which the first ``room``, what is left of the budget, are taken.  A pair (index, t) keeps the turn's
        first t tokens, fewer than it has.  Asked again when these have ended, until the budget is spent.
        None of them: fresh roots.
        """
        return ()

    def known(self, delta_h: float) -> float:
        """``delta_h``, if it is known.  Raises :class:`EntropyUnknown`."""
        if math.isnan(delta_h):
            raise EntropyUnknown(
                f"branching={self.name or type(self).__name__} decides by token entropies and the engine "
                "reports none: use an engine that does, or branching=random, or branching=none"
            )
        return delta_h


@dataclass(frozen=True)
class Arpo(Policy):
    """ARPO's rule (arXiv 2507.19849 §3.1): P(fork) = clip(α + β·ΔH, 0, 1), one uniform draw.

    ΔH is the mean token entropy over the first k tokens after *this* result minus the mean over the first k
    tokens of the branch's own root, both over ln V.  The paper states P = α + β·ΔH; the draw makes it a
    probability, as in the released code.
    """

    alpha: float
    beta: float
    name: ClassVar[str] = "arpo"

    def decide(self, probe: Probe, state: TreeState, rng: np.random.Generator) -> Decision:
        delta_h = self.known(probe.delta_h)
        probability = _clip(self.alpha + self.beta * delta_h)
        return _drawn(probability, delta_h, rng)


@dataclass(frozen=True)
class ArpoCalibrated(Arpo):
    """The default.  P(fork) = clip(α + β·(2u - 1), 0, 1), u the rank, from 0 to 1, of how unsure the model is
    among the results before.

    ``by``: what says so, one of :data:`MEASURES`, ΔH if nothing else is said.  ΔH over ln V is some
    hundredths wide, so that β times it moves :class:`Arpo`'s P by less than the draw can tell.  Ranks are
    uniform whatever that width is: α is the mean rate, and P goes from α - β, where the model is surest, to
    α + β, where it is least sure.  Ranks are among the last ``window`` results of this rollout worker, which
    a restart forgets; P = α before there are ``least`` of them, and where the measure is not known.

    ``by_depth``: among those alone that are as many tool calls deep.  Else, where ΔH rises with depth, as it
    often does, later results fork more, and below them less is left to differ.
    """

    window: int = 1024
    least: int = 32
    by: str = "delta"
    by_depth: bool = False
    name: ClassVar[str] = "arpo-calibrated"
    _seen: defaultdict[int, Recent] = field(
        default_factory=lambda: defaultdict(Recent), init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.window:
            raise PluginError(
                f"branching.options: least={self.least} must be 1 or more, and at most window={self.window}"
            )
        if self.by not in MEASURES:
            raise PluginError(f"branching.options.by={self.by!r}: choose one of {', '.join(MEASURES)}")

    @property
    def asks_forks(self) -> bool:
        """A result has siblings only once the tree has forked there."""
        return self.by == "siblings"

    def decide(self, probe: Probe, state: TreeState, rng: np.random.Generator) -> Decision:
        unsure = MEASURES[self.by](probe)
        if self.by not in ("surprise", "siblings"):
            self.known(unsure)
        rank = self._rank(unsure, self._seen[state.calls if self.by_depth else 0])
        return _drawn(_clip(self.alpha + self.beta * (2 * rank - 1)), probe.delta_h, rng)

    def _rank(self, value: float, before: Recent) -> float:
        """Of ``value`` among those ``before``, 1/2 while that cannot be told; remembers it."""
        if math.isnan(value):
            return 0.5
        rank = before.rank(value) if len(before) >= self.least else 0.5
        before.add(value, self.window)
        return rank


def _surprise(probe: Probe) -> float:
    return -float(probe.logprobs.mean(dtype=np.float64)) if probe.logprobs.size else math.nan


def _varentropy(probe: Probe) -> float:
    """-log p of a token drawn from p has the mean H and the variance that is meant: (-log p - H)² is an
    estimate of it from one draw, right in the mean, and needs nothing of p but what an engine reports.
    """
    squares = (-probe.logprobs.astype(np.float64) - probe.entropies) ** 2
    known = squares[np.isfinite(squares)]
    return float(known.mean()) if known.size else math.nan


def _disagreement(probe: Probe) -> float:
    return 1 - sum(probe.shared) / len(probe.shared) if probe.shared else math.nan


MEASURES: dict[str, Callable[[Probe], float]] = {  # how unsure the model is after a result; NaN: unknown
    "delta": lambda probe: probe.delta_h,
    "entropy": lambda probe: probe.entropy,
    "first": lambda probe: float(probe.entropies[0]) if probe.entropies.size else math.nan,
    "surprise": _surprise,
    "varentropy": _varentropy,
    "siblings": _disagreement,
}


@dataclass(frozen=True)
class Aepo(Policy):
    """P(fork) = clip(1 - (1 - α)/(1 - penalty·l) + β·ΔH, 0, 1), l forks at the last results in a row: AEPO's
    penalty on branching that goes on and on (arXiv 2510.14545 §3.2).

    ΔH is :class:`Arpo`'s.  The released code, which grows a prompt in rounds, counts the rounds in a row in
    which it got a new branch; without rounds it is the tool results in a row on one path at which the tree
    forked.  Its number of roots from a probe, which both released recipes switch off, is not there.
    """

    alpha: float
    beta: float
    penalty: float = 0.05
    name: ClassVar[str] = "aepo"

    def decide(self, probe: Probe, state: TreeState, rng: np.random.Generator) -> Decision:
        delta_h = self.known(probe.delta_h)
        left = 1 - self.penalty * state.streak
        probability = _clip(1 - (1 - self.alpha) / left + self.beta * delta_h) if left > 0 else 0.0
        return _drawn(probability, delta_h, rng)


@dataclass(frozen=True)
class ArpoPaper(Policy):
    """The paper taken literally: fork iff α + β·ΔH > τ.  No draw; the measurement is :class:`Arpo`'s.

    With the paper's α = τ = 0.5 this is "fork iff ΔH > 0".
    """

    alpha: float
    beta: float
    tau: float
    name: ClassVar[str] = "arpo-paper"

    def decide(self, probe: Probe, state: TreeState, rng: np.random.Generator) -> Decision:
        delta_h = self.known(probe.delta_h)
        fork = self.alpha + self.beta * delta_h > self.tau
        return Decision(int(fork), float(fork), math.nan, delta_h)


@dataclass(frozen=True)
class ArpoRelease(Policy):
    """The released code's rule: its estimator, its lag and its draw.

    * Estimator: the *sum* of the entropies of a segment's first 20 tokens (fewer if the segment is shorter)
      over ln V, so short segments look surer.  The released code sums -p·ln p over the 10 likeliest tokens
      only; ours are entropies over the whole vocabulary, larger by the tail's share.
    * Lag: the fork is placed after this result but decided by the segment before it.  At a slot's first call
      that segment is also its baseline: ΔH = 0 and P = α.
    * A fork does not inherit a baseline; its own first segment becomes one.
    * Draw: fork iff clip(u - β·ΔH, 0, 1) ≤ α for u uniform on [0, 1): P = clip(α + β·ΔH, 0, 1) for 0 < α < 1.

    Left out: the released table of baselines was never cleared between prompts.
    """

    probe_tokens: int = field(default=20, init=False)
    alpha: float
    beta: float
    name: ClassVar[str] = "arpo-release"
    lag: ClassVar[bool] = True
    inherits: ClassVar[bool] = False

    def measure(self, entropies: NDArray[np.float32], log_vocab: float) -> float:
        """H = sum of token entropies / ln V; may exceed 1."""
        known = entropies[np.isfinite(entropies)]
        return float(known.sum(dtype=np.float64)) / log_vocab if known.size else math.nan

    def decide(self, probe: Probe, state: TreeState, rng: np.random.Generator) -> Decision:
        delta_h = self.known(probe.delta_h)
        draw = float(rng.random())
        fork = _clip(draw - self.beta * delta_h) <= self.alpha
        return Decision(int(fork), _clip(self.alpha + self.beta * delta_h), draw, delta_h)


@dataclass(frozen=True)
class Random(Policy):
    """The control: P(fork) = α whatever the entropy, which is still measured for the record."""

    alpha: float
    name: ClassVar[str] = "random"

    def decide(self, probe: Probe, state: TreeState, rng: np.random.Generator) -> Decision:
        return _drawn(self.alpha, probe.delta_h, rng)


@dataclass(frozen=True)
class Never(Policy):
    """``none``: n independent roots, the sampling of plain GRPO.  ΔH is measured for the record."""

    name: ClassVar[str] = "none"
    can_fork: ClassVar[bool] = False

    def decide(self, probe: Probe, state: TreeState, rng: np.random.Generator) -> Decision:
        return Decision(0, 0.0, math.nan, probe.delta_h)


def make_policy(config: BranchingConfig) -> Policy:
    """The policy that the configuration names.  Raises :class:`system.plugins.PluginError`."""
    return POLICIES.make(
        config.name,
        config.options,
        probe_tokens=config.probe_tokens,
        alpha=config.alpha,
        beta=config.beta,
        tau=config.tau,
    )


def decided(policy: Policy, given: Any) -> Decision:
    """What the policy's ``decide`` returned.  Raises :class:`system.plugins.PluginError` unless it is a
    :class:`Decision` to fork so many times, or not at all.
    """
    forks: Any = getattr(given, "forks", None)
    if isinstance(given, Decision) and isinstance(forks, int | np.integer) and forks >= 0:
        return given
    raise PluginError(f"branching={type(policy).__name__}: decide() returned {given!r}: no number of forks")


def _drawn(probability: float, delta_h: float, rng: np.random.Generator) -> Decision:
    draw = float(rng.random())
    return Decision(int(draw < probability), probability, draw, delta_h)


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)
