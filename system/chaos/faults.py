"""Which faults there are, and a seeded drawing of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ACTORS = ("engine", "rollout", "search", "python", "learner")
PROCESSES = (*ACTORS, "driver", "raylet")
FILES = ("checkpoint", "trees", "ledger")
MOMENTS = ("start", "checkpoint", "evaluation", "shutdown")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: SIGKILL, or SIGSTOP and later SIGCONT, of a process; a damaged file; a full disk."""

    kind: str  # kill, freeze, damage, fill
    target: str  # a process, a file, or the disk
    moment: str = "training"  # what the run is doing
    delay_s: float = 0.0  # after that has begun

    def __str__(self) -> str:
        return f"{self.kind} {self.target} during {self.moment}"


KINDS: tuple[Fault, ...] = (
    *(Fault("kill", target) for target in PROCESSES),
    *(Fault("freeze", target) for target in PROCESSES),
    *(Fault("kill", target, moment) for moment in MOMENTS for target in ("driver", "learner")),
    *(Fault("damage", target) for target in FILES),
    Fault("fill", "disk"),
)


def draw(count: int, seed: int, kinds: Sequence[Fault] = KINDS) -> list[Fault]:
    """``count`` of ``kinds`` in random order, each as often as the others, with a random delay below 3 s."""
    rng = np.random.default_rng(seed)
    drawn: list[Fault] = []
    while len(drawn) < count:
        for index in rng.permutation(len(kinds)):
            kind = kinds[index]
            drawn.append(Fault(kind.kind, kind.target, kind.moment, round(float(rng.uniform(0, 3)), 2)))
    return drawn[:count]
