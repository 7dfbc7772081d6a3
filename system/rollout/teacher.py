"""On-policy distillation's questions: how likely a tree's tokens are to a teacher that a server holds."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from system.config import ConfigError, TeacherConfig
from system.engine.control import Http
from system.engine.pool import EnginePool
from system.engine.protocol import EngineError
from system.engine.score import score
from system.rollout.failure import RolloutFailed
from system.tree.builder import TreeBuilder

log = logging.getLogger(__name__)

SPELLED = 256  # tokens of a vocabulary, evenly spread, that a teacher must spell as the student does


class Teacher:
    """The servers at ``teacher.urls``.  They speak as an engine does, and are never given new weights."""

    def __init__(
        self,
        config: TeacherConfig,
        vocab: int,
        longest: int,
        key: str = "",
        spelled: Mapping[int, str] | None = None,
    ) -> None:
        """``vocab``: tokens of the student's tokenizer; ``longest``: tokens that a path of a tree may have,
        its prompt included; ``key``: what the servers want to be shown; ``spelled``: what some of the
        tokens are to the student's tokenizer (:func:`spelling`).
        """
        self._config, self._vocab, self._longest, self._key = config, vocab, longest, key
        self._spelled = dict(spelled or {})
        self.pool = self._pool(config.urls)

    def _pool(self, urls: list[str]) -> EnginePool:
        config = self._config
        return EnginePool(urls, deadline_s=config.deadline_s, in_flight=config.concurrency, key=self._key)

    async def check(self) -> None:
        """Have every server score the last token of our vocabulary, spell some of it, and tell how many
        tokens it takes.

        Raises ConfigError for one that cannot (its model reads fewer tokens than ours, or it is not there),
        for one whose tokens are other texts, and for one that takes fewer tokens than a path may have: the
        longest turns would go untaught.
        """
        for number, url in enumerate(self._config.urls):
            pool, tokens = self._pool([url]), np.array([0, self._vocab - 1], np.int32)
            try:
                await score(pool, tokens, 1, rid=f"teacher check {uuid.uuid4().hex}")
            except EngineError as error:
                raise ConfigError(
                    f"teacher.urls[{number}]={url} cannot score token {self._vocab - 1}, the last of the "
                    f"model's tokenizer: {error!s}: start a server (SGLang's, or espalier's own) of "
                    "a model with the same tokenizer there"
                ) from error
            finally:
                await pool.close()
            await self._check_spelling(number, url)
            await self._check_length(number, url)

    async def _check_spelling(self, number: int, url: str) -> None:
        """Of SGLang's server ``/detokenize`` says it, and of ours."""
        if not self._spelled:
            return
        asked = {"tokens": [[token] for token in self._spelled], "skip_special_tokens": False}
        async with Http([url], self._key) as http:
            try:
                texts = [
                    str(text) for text in (await http.call(f"{url.rstrip('/')}/detokenize", asked))["text"]
                ]
            except (EngineError, KeyError, TypeError) as error:
                log.warning(
                    "teacher %s does not tell what its tokens are (%r): one with another tokenizer would "
                    "teach nonsense",
                    url,
                    error,
                )
                return
        for (token, ours), theirs in zip(self._spelled.items(), texts, strict=False):
            if ours.strip() != theirs.strip():  # blanks beside punctuation some tokenizers clean away
                raise ConfigError(
                    f"teacher.urls[{number}]={url} has another tokenizer: token {token} is {theirs!r} there, "
                    f"and {ours!r} to the model: start a server of a model with the model's tokenizer there"
                )

    async def _check_length(self, number: int, url: str) -> None:
        """Of SGLang's server ``/server_info`` says it, and of ours: a request must have fewer tokens than
        ``max_req_input_len``, which is below the context's length and below what the cache holds.
        """
        async with Http([url], self._key) as http:
            try:
                most = int((await http.call(f"{url.rstrip('/')}/server_info"))["max_req_input_len"]) - 1
            except (EngineError, KeyError, TypeError, ValueError) as error:
                log.warning(
                    "teacher %s does not tell how many tokens it takes (%r): longer turns would go untaught",
                    url,
                    error,
                )
                return
        if most < self._longest:
            raise ConfigError(
                f"teacher.urls[{number}]={url} takes {most} tokens at most, and a branch may have "
                f"{self._longest} (engine.max_context), so the longest turns would go untaught: start it "
                "with a longer context (SGLang's --context-length, our --max-context), or lower that"
            )


def spelling(tokenizer: Any) -> dict[int, str]:
    """What some tokens of a tokenizer (transformers') are: its added ones, and others from all over it."""
    some = {int(token) for token in np.linspace(0, len(tokenizer) - 1, SPELLED)}
    known = sorted({*some, *tokenizer.get_added_vocab().values()})
    return {token: str(tokenizer.decode([token], skip_special_tokens=False)) for token in known}


@dataclass
class Lessons:
    """Has a teacher score what one tree's branches have written, each node once."""

    teacher: Teacher | None  # None: there are no questions
    growth: TreeBuilder
    route: str
    mishap: Callable[[str, str], None]  # is told what failed: of which kind, and why
    asked: set[int] = field(default_factory=set[int])
    failed: list[str] = field(default_factory=list[str])
    answered: int = 0  # nodes

    @property
    def on(self) -> bool:
        return self.teacher is not None

    async def node(self, node: int) -> None:
        """Score the tokens of MODEL node ``node``, which has closed.  A failure leaves them unscored."""
        self.asked.add(node)
        if self.teacher is None or not (own := self.growth.n_tokens(node)):
            return
        tokens = self.growth.path_tokens(node)
        rid = f"{self.route}:teacher:{uuid.uuid4().hex[:12]}"
        try:
            found = await score(self.teacher.pool, tokens, tokens.size - own, rid=rid, route=self.route)
        except EngineError as error:
            self.failed.append(str(error))
            self.mishap("teacher", self.failed[-1])
        else:
            self.answered += 1
            self.growth.teach(node, found.logprob)

    async def rest(self) -> None:
        """Score the nodes that nobody has asked about: cut off, or written before the run was resumed."""
        if self.teacher is None:
            return
        late = [node for node in self.growth.untaught() if node not in self.asked]
        await asyncio.gather(*(self.node(node) for node in late))

    def over(self) -> None:
        """The tree has ended.  Raises :class:`RolloutFailed` if every question failed."""
        if self.failed and not self.answered:
            raise RolloutFailed(self.growth.prompt_id, "teacher", self.failed[0])
