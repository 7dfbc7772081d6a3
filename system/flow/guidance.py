"""Which trees are guided, and by how many actions of a demonstration.  A pure state machine.

ActGuide-RL (arXiv 2605.12004) grows a group of a question without a guide, and if none of it earned anything
searches, by halving and with two probes a time, the fewest leading actions of a human trajectory which in the
prompt get a success; with these it grows the group again.  Here nobody waits for a search: it goes on from
tree to tree of a question, every guided tree is a probe, and what it finds is trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from system.config import Config
from system.flow.curriculum import Pool
from system.tree.prompt import Prompt


@dataclass(frozen=True, slots=True)
class Guides:
    """What may be told of each question, and how often."""

    hopeless: float  # share of the trees of a hopeless question that are guided
    others: float  # of any other question's
    actions: Mapping[str, int]  # by question: how many actions its demonstration has

    @classmethod
    def of(cls, config: Config, prompts: Iterable[Prompt]) -> Guides | None:
        """None where no tree is guided."""
        guide = config.guide
        if not guide.on:
            return None
        return cls(guide.hopeless, guide.others, {one.id: len(one.actions) for one in prompts})

    def opening(self) -> dict[str, float | str]:
        """What a ledger says of them at its beginning."""
        digest = hashlib.sha256(json.dumps(sorted(self.actions.items())).encode()).hexdigest()
        return {"hopeless": self.hopeless, "others": self.others, "digest": digest}


@dataclass(slots=True)
class Search:
    """The fewest actions of one question with which a tree has a right answer, by halving.

    It never ends, for the model learns: once ``works`` is the least, and has worked again, it begins anew
    below that; where it fails again, above.
    """

    most: int  # actions there are, 1 or more
    fails: int = 0  # the most that are known to be too few
    works: int | None = None  # the fewest that are known to be enough

    def next(self) -> int:
        """How many to tell now."""
        return (self.fails + (self.works or self.most) + 1) // 2

    def told(self, actions: int, success: bool) -> None:
        """A tree that was told so many had a right answer, or had none."""
        if success:
            self.works = min(actions, self.works or actions)
            if self.works - self.fails <= 1:
                self.fails = 0
            return
        self.fails = max(actions, self.fails)
        if self.works is not None and self.works <= self.fails:
            self.works = None
        if self.fails >= self.most:  # even all of them: there is nothing more to tell
            self.fails = 0


@dataclass(slots=True)
class _Question:
    search: Search
    visits: set[int] = field(default_factory=set)  # whose trees have told what came of them


class Guidance:
    """Everything follows from the seed and the order of the calls."""

    def __init__(self, guides: Guides, seed: int) -> None:
        self._guides, self._seed = guides, seed
        self._questions: dict[str, _Question] = {}
        self._draws = 0

    def actions(self, question: str, pool: Pool | None) -> int:
        """How many actions the new tree of ``question`` is told; 0: it is not guided.

        ``pool``: what the question is; None without a curriculum.
        """
        self._draws += 1
        share = self._guides.hopeless if pool == Pool.HOPELESS else self._guides.others
        most = self._guides.actions.get(question, 0)
        if not most or np.random.default_rng([self._seed, 3, self._draws]).random() >= share:
            return 0
        return self._questions.setdefault(question, _Question(Search(most))).search.next()

    def told(self, question: str, visit: int, actions: int, rate: float | None) -> None:
        """The tree of a visit that was told ``actions`` has closed; ``rate`` as in :meth:`Curriculum.back`.

        What a visit says a second time, its tree having been lost and grown anew, or kept, does not count.
        """
        known = self._questions[question]
        if rate is not None and visit not in known.visits:
            known.visits.add(visit)
            known.search.told(actions, rate > 0)
