"""Scores of leaves: each is made when its branch ends, beside the generation of the others.

A leaf's value is the weighted sum of what the rewards say (:mod:`system.rollout.scorer`: one reward).  A
score that fails is never a number: the leaf stays unscored, and the reason is kept.  One rule ends a run
whose rewards fail: more than ``reward.failure_limit`` of the last 100 leaves; of a reward with
``on_failure: stop``, any.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from system.awake import AwakeTimeout
from system.config import Config, rewards
from system.envs.live import BranchSession
from system.envs.protocol import WorldFailed
from system.rollout.reward import BranchView, Score, ScoreFailed
from system.rollout.score_pool import RewardBroken
from system.rollout.scorer import LARGEST, Scorer
from system.rollout.words import final_answer
from system.tree.prompt import Prompt

log = logging.getLogger(__name__)

ANSWER_CHARS = 200  # of a final answer, in the record
WINDOW = 100  # leaves that ``reward.failure_limit`` looks back over


def overlong(tokens: int, *, limit: int, buffer: int, penalty: float) -> float:
    """DAPO's soft punishment of long answers (arXiv 2503.14476 §3.4): 0 up to ``limit - buffer`` tokens, from
    there a line that reaches -``penalty`` at the limit.  A ``buffer`` of 0 is none.
    """
    return min(0.0, (limit - buffer - tokens) / buffer * penalty) if buffer else 0.0


class Scoring:
    """The rewards of a run, for all trees of a process."""

    def __init__(
        self,
        scorers: Sequence[Scorer],
        *,
        failure_limit: float = 1.0,
        close_deadline_s: float = 300.0,
        overlong: Callable[[int], float] = lambda _: 0.0,
        key: str = "reward",
        told_as: str = "reward",
    ) -> None:
        """``overlong``: what is added for a branch of so many tokens; ``key``: of the settings, for messages;
        ``told_as``: where counters stand.
        """
        self.key, self._told_as = key, told_as
        self.scorers, self.failure_limit, self.close_deadline_s = scorers, failure_limit, close_deadline_s
        self.overlong = overlong
        self._reasons: deque[str] = deque(maxlen=WINDOW)  # of the last leaves; "": it was scored
        self._failed: Counter[str] = Counter()
        self._waited_s = 0.0

    @classmethod
    def of(
        cls,
        config: Config,
        secret: Callable[[str], str | None] = lambda _: None,
        store: Path | None = None,
        *,
        key: str = "reward",
        told_as: str = "reward",
    ) -> Scoring:
        """As ``config.reward`` says, which stands at ``key``.  ``secret``: the key that an environment
        variable of this name held when the run began; ``store``: the directory for what a reward keeps for a
        resumed run.
        """
        settings = config.reward
        return cls(
            [Scorer.of(config, chosen, secret=secret, store=store) for chosen in rewards(settings, key)],
            failure_limit=settings.failure_limit,
            close_deadline_s=settings.close_deadline_s,
            overlong=partial(
                overlong,
                limit=config.rollout.max_response_tokens,
                buffer=settings.overlong_buffer,
                penalty=settings.overlong_penalty,
            ),
            key=key,
            told_as=told_as,
        )

    @property
    def measured(self) -> list[str]:
        """The names of parts that are metrics."""
        return [*(name for scorer in self.scorers for name in scorer.measured), "overlong"]

    def total(self, scores: Sequence[Score], branch: BranchView) -> Score:
        """The value of a leaf from what each reward says of it, in their order; the first decides whether it
        is correct.  Raises :class:`ScoreFailed` for a sum that no record can hold.
        """
        weighed = zip(self.scorers, scores, strict=True)
        value = sum(scorer.chosen.weight * score.value for scorer, score in weighed)
        parts = self.parts(dict(enumerate(scores)))
        if added := self.overlong(branch.tokens):
            value, parts = value + added, {**parts, "overlong": added}
        if branch.steps:
            earned = sum(branch.steps)
            value, parts = value + earned, {**parts, "steps": earned}
        if not abs(value) <= LARGEST:
            raise ScoreFailed(f"the weighted sum of the rewards is {value}", "number")
        return Score(value, scores[0].correct, parts)

    def parts(self, scores: Mapping[int, Score]) -> dict[str, float]:
        """The unweighted values by the rewards' labels, and their own parts below these; of the only reward
        of a run, its parts.
        """
        found: dict[str, float] = {}
        for number, score in sorted(scores.items()):
            label = self.scorers[number].chosen.label
            found |= {label: score.value} if label else {}
            found |= {f"{label}/{name}" if label else name: part for name, part in score.parts.items()}
        return found

    def count(self, failed: ScoreFailed | None) -> None:
        """One more leaf, scored unless it ``failed``.  Raises :class:`RewardBroken` when too many did."""
        self._reasons.append(failed.reason if failed else "")
        if failed is None:
            return
        self._failed[failed.reason] += 1
        why = Counter(reason for reason in self._reasons if reason)
        if why.total() > self.failure_limit * WINDOW:
            told = ", ".join(f"{reason} {count}" for reason, count in why.most_common())
            raise RewardBroken(
                f"{why.total()} of the last {len(self._reasons)} leaves could not be scored ({told}), more "
                f"than {self.key}.failure_limit={self.failure_limit:g} of {WINDOW}: {failed}"
            ) from failed

    def waited(self, seconds: float) -> None:
        """A tree has waited so long for its scores after its last branch had ended."""
        self._waited_s += seconds

    @property
    def counters(self) -> dict[str, float]:
        """Running totals, as ``reward/…``: leaves that failed by reason, seconds that trees waited for scores
        when nothing else of them was left, and what rewards count themselves (``reward/<reward>/…``).
        """
        at = self._told_as
        totals = {f"{at}/failed/{reason}": float(count) for reason, count in self._failed.items()}
        totals[f"{at}/close_wait_s"] = self._waited_s
        for scorer in self.scorers:
            name = scorer.chosen.shown
            totals |= {f"{at}/{name}/{what}": total for what, total in scorer.counters.items()}
        return totals

    async def close(self) -> None:
        for scorer in self.scorers:
            await scorer.close()


class TreeScores:
    """The scores of one tree's leaves."""

    def __init__(
        self,
        scoring: Scoring,
        prompt: Prompt,
        tasks: asyncio.TaskGroup,
        mishap: Callable[[str, str], None],
        since_start: Callable[[], float] | None = None,
    ) -> None:
        """``tasks``: owns what scores.  ``mishap``: is told what failed of the leaves' worlds.
        ``since_start``: seconds since the tree's start, for the record.
        """
        self._since_start = since_start
        self._began_s, self._ended_s = dict[int, float](), dict[int, float]()  # of leaves, if that is known
        self._scoring, self._prompt, self._tasks, self._mishap = scoring, prompt, tasks, mishap
        self._beginning: list[asyncio.Task[None]] = []  # ended branches whose worlds are asked first
        self._views: dict[int, BranchView] = {}  # of the leaves whose end says something about the policy
        self._found: dict[tuple[int, int], Score | ScoreFailed] = {}  # by leaf and number of the reward
        self._running: set[asyncio.Task[None]] = set()
        self.scores: dict[int, Score] = {}
        self.failures: dict[int, ScoreFailed] = {}

    def begin(self, leaf: int, view: BranchView, session: BranchSession | None) -> None:
        """A branch has ended: score its leaf by every reward that looks at one alone, with the final state of
        its world, which ends then.
        """
        if self._since_start is not None:
            self._began_s[leaf] = self._since_start()
        name = f"begin to score leaf {leaf} of {self._prompt.id}"
        self._beginning.append(self._tasks.create_task(self._begin(leaf, view, session), name=name))

    async def _begin(self, leaf: int, view: BranchView, session: BranchSession | None) -> None:
        if session is not None:
            try:
                view = replace(view, result=await session.result())
            except WorldFailed as error:
                log.warning("prompt %s, leaf %d: %s", self._prompt.id, leaf, error)
                self._mishap(error.reason, str(error))
                return
            session.end("its branch has ended")
        self._views[leaf] = view
        for number, scorer in enumerate(self._scoring.scorers):
            if not scorer.group:
                self._start(number, scorer, [leaf])

    async def close(self) -> None:
        """Wait for all scores, then compare the leaves: ``scores`` and ``failures`` hold each leaf once.

        Raises :class:`RewardBroken`.
        """
        await asyncio.gather(*self._beginning)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with AwakeTimeout(self._scoring.close_deadline_s):
                await self._scored_all()
                for number, scorer in enumerate(self._scoring.scorers):
                    if scorer.group and self._views:
                        self._start(number, scorer, list(self._views))
                await self._scored_all()
        except TimeoutError:
            for task in self._running:
                task.cancel()
            await self._scored_all()
        self._scoring.waited(loop.time() - began)
        for leaf in self._views:
            self._settle(leaf)

    def record(self, leaves: int) -> dict[str, Any]:
        """For the tree's ``meta``: ``parts`` and ``answers`` of each of the ``leaves`` (None: not known),
        ``unscored`` (why, by leaf), ``scored_s`` (between which seconds of the tree's, by leaf) and
        ``measured`` (the names of parts that are metrics).
        """
        parts: list[dict[str, float] | None] = []
        for leaf in range(leaves):
            if (score := self.scores.get(leaf)) is not None:
                parts.append(score.parts)
            else:  # what the others said of it
                parts.append(self._scoring.parts(self._good(leaf)) or None)
        why = {str(leaf): str(failed) for leaf, failed in self.failures.items()}
        answers = [_brief(view) if (view := self._views.get(leaf)) else None for leaf in range(leaves)]
        unscored: dict[str, Any] = {"unscored": why} if why else {}
        if self._since_start is not None:
            unscored["scored_s"] = [self._times(leaf) for leaf in range(leaves)]
        return {"parts": parts, "answers": answers, **unscored, "measured": self._scoring.measured}

    def _times(self, leaf: int) -> tuple[float, float] | None:
        began, ended = self._began_s.get(leaf), self._ended_s.get(leaf)
        return None if began is None or ended is None else (round(began, 4), round(ended, 4))

    def _start(self, number: int, scorer: Scorer, leaves: Sequence[int]) -> None:
        name = f"score leaf {leaves[0]} of {self._prompt.id}"
        task = self._tasks.create_task(self._score(number, scorer, leaves), name=name)
        self._running.add(task)

    async def _score(self, number: int, scorer: Scorer, leaves: Sequence[int]) -> None:
        found: Iterable[Score | ScoreFailed]
        try:
            found = await scorer.score(self._prompt, [self._views[leaf] for leaf in leaves])
        except ScoreFailed as failed:
            found = [failed] * len(leaves)
        for leaf, one in zip(leaves, found, strict=True):
            if isinstance(one, ScoreFailed) and scorer.chosen.on_failure == "stop":
                raise RewardBroken(f"{scorer.chosen.key}.on_failure=stop, and {one.reason}: {one}") from one
            self._found[leaf, number] = one
            if self._since_start is not None:
                self._ended_s[leaf] = self._since_start()

    async def _scored_all(self) -> None:
        """Wait for the scores that are being made."""
        if self._running:
            await asyncio.wait(self._running)

    def _good(self, leaf: int) -> dict[int, Score]:
        """What rewards said of a leaf, by their numbers."""
        numbers = range(len(self._scoring.scorers))
        found = {number: self._found.get((leaf, number)) for number in numbers}
        return {number: one for number, one in found.items() if isinstance(one, Score)}

    def _settle(self, leaf: int) -> None:
        try:
            self.scores[leaf] = self._scoring.total([*self._all(leaf)], self._views[leaf])
        except ScoreFailed as failed:
            log.warning("prompt %s, leaf %d: %s", self._prompt.id, leaf, failed)
            self.failures[leaf] = failed
        self._scoring.count(self.failures.get(leaf))

    def _all(self, leaf: int) -> Iterable[Score]:
        """What every reward says of a leaf.  Raises the first failure."""
        for number, scorer in enumerate(self._scoring.scorers):
            match self._found.get((leaf, number)):
                case Score() as score:
                    yield score
                case ScoreFailed() as failed:
                    raise failed
                case _:
                    limit = self._scoring.close_deadline_s
                    name = scorer.chosen.shown
                    text = f"reward {name}: no score within {self._scoring.key}.close_deadline_s={limit:g} s"
                    raise ScoreFailed(f"{text} of the tree's end", "deadline")


def _brief(view: BranchView) -> str:
    """The final answer for the record; of a long one the beginning and a digest: only equals are equal."""
    answer = final_answer(view.model_text)
    if len(answer) <= ANSWER_CHARS:
        return answer
    return f"{answer[:ANSWER_CHARS]}… {hashlib.sha256(answer.encode(errors='replace')).hexdigest()[:16]}"
