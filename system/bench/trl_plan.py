"""What ``espalier bench trl`` runs: the ways, how often, and in what order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from system.bench.baselines import Way
from system.bench.rounds import checked, in_turn
from system.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to do the work: Espalier's ``way``, or, without one, TRL's."""

    says: str
    way: Way | None = None
    threads: int | None = None  # TRL's, of OpenMP; None: as it comes
    in_process: bool = False  # TRL's tools
    continuous: bool = False  # TRL's generation
    fast_only: bool = False  # no run with slow tools, where what sets it apart does not count
    judged: bool = True  # the accuracy of what it trained is measured


CONTESTANTS = {
    "trl": Contestant("TRL as it comes, static generate, our sandbox and search over HTTP"),
    "trl-1-thread": Contestant("TRL with OMP_NUM_THREADS=1", threads=1, fast_only=True, judged=False),
    "trl-in-process": Contestant(
        "TRL, its tools in its own process", in_process=True, fast_only=True, judged=False
    ),
    "trl-continuous": Contestant(
        "TRL, transformers' continuous batching", continuous=True, fast_only=True, judged=False
    ),
    "linear-sync": Contestant(
        "linear rollouts, synchronous: TRL's algorithm", Way("synchronous", ("learn.tp=1",))
    ),
    "linear-async": Contestant("linear rollouts, η = 1", Way("espalier", ("branching=none", "learn.tp=1"))),
    "arpo": Contestant("ARPO's trees, η = 1: the default", Way("espalier", ("learn.tp=1",))),
    "arpo-tp2": Contestant("the same on two learner ranks", Way("espalier", ("learn.tp=2",)), judged=False),
}
QUICK = ("trl", "linear-sync", "arpo")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run."""

    ways: tuple[str, ...]
    latencies: tuple[float, ...]  # seconds that a search takes longer
    rounds: int
    steps: int  # training steps of a run with the first latency
    slow_steps: int  # with the others
    warm_steps: int  # of the warm start that makes the model
    accuracy: bool  # of the models of the runs with the first latency

    @classmethod
    def of(
        cls,
        quick: bool = False,
        words: Sequence[str] = (),
        rounds: int | None = None,
        latency: str = "",
        steps: int | None = None,
    ) -> Plan:
        """As the command line says.  Raises ConfigError for what cannot be run."""
        made = (
            cls(QUICK, (0.0, 0.1), 2, steps=8, slow_steps=4, warm_steps=150, accuracy=False)
            if quick
            else cls(tuple(CONTESTANTS), (0.0, 0.1), 5, steps=40, slow_steps=8, warm_steps=300, accuracy=True)
        )
        if unknown := [word for word in words if word not in CONTESTANTS]:
            raise ConfigError(f"bench trl {unknown[0]}: the ways are {', '.join(CONTESTANTS)}")
        if words:
            made = replace(made, ways=tuple(dict.fromkeys(words)))
        if rounds is not None:
            made = replace(made, rounds=rounds)
        if steps is not None:
            made = replace(made, steps=steps, slow_steps=min(steps, made.slow_steps))
        if latency:
            made = replace(made, latencies=_seconds(latency))
        checked(made.rounds)
        if min(made.steps, made.slow_steps) < 4:
            raise ConfigError(
                f"--steps {made.steps}: 4 or more, of which the first and the last do not count"
            )
        return made

    def turns(self) -> list[tuple[int, float, str]]:
        """(round, latency, way) of every run in order: the ways shift by one each round."""
        found: list[tuple[int, float, str]] = []
        for number in range(self.rounds):
            for i, latency in enumerate(self.latencies):
                ways = [way for way in self.ways if i == 0 or not CONTESTANTS[way].fast_only]
                found += [(number + 1, latency, way) for way in in_turn(ways, number)]
        return found

    def steps_at(self, latency: float) -> int:
        return self.steps if latency == self.latencies[0] else self.slow_steps


def _seconds(text: str) -> tuple[float, ...]:
    try:
        found = tuple(dict.fromkeys(float(one) for one in text.split(",")))
    except ValueError:
        found = ()
    if not found or not all(0 <= one < 60 for one in found):
        raise ConfigError(f"--latency {text}: seconds from 0 to 60, as 0,0.1")
    return found
