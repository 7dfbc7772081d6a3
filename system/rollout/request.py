"""What a rollout asks of its engine: to write a segment, or to score one that is written."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from system.awake import AwakeTimeout
from system.engine.protocol import Chunk, EngineError, GenerateRequest, Sampling
from system.engine.score import Scores, score
from system.rollout.branch import Branch
from system.rollout.context import RolloutContext
from system.rollout.encode import encode_text
from system.text import described
from system.tree.builder import TreeBuilder
from system.tree.record import Int32

STOP_TOKENS = 64  # more than any stop string has: what a resumed segment tells of what it said before


def segment_request(
    context: RolloutContext,
    growth: TreeBuilder,
    branch: Branch,
    begin: int,
    room: int,
    temperature: float,
    route: str,
    records_routes: bool,
) -> GenerateRequest:
    """What ``branch`` writes next, at most ``room`` tokens after those of its path, of which the ones from
    number ``begin`` on are of the same turn.  ``records_routes``: the experts are wanted of all tokens of
    which there is no record yet.
    """
    path = growth.path_tokens(branch.node)
    return GenerateRequest(
        rid=_request_id(growth.prompt_id, ".".join(map(str, branch.key))),
        input_ids=path,
        sampling=Sampling(
            max_new_tokens=room,
            temperature=temperature,
            top_p=context.config.top_p,
            top_k=context.config.top_k,
            stop=context.stops,
            stop_token_ids=context.chat.stop_ids,
            seed=branch.seed,
        ),
        route=route,
        parent=branch.request,
        said=context.chat.decode(path[max(begin, path.size - STOP_TOKENS) :]),
        routes_from=growth.unrouted(branch.node) if records_routes else None,
    )


def take(growth: TreeBuilder, node: int, request: GenerateRequest, chunk: Chunk) -> None:
    """Append to ``node`` what came of ``request``, which goes on from there."""
    growth.extend(node, chunk.tokens, chunk.logprob, chunk.entropy, chunk.version)
    if chunk.routes is not None and request.routes_from is not None:
        growth.route(node, request.routes_from, chunk.routes)


@dataclass(frozen=True)
class GivenTokens:
    """Has the engine score tokens that one tree holds already."""

    context: RolloutContext
    growth: TreeBuilder
    prompt_id: str
    route: str
    temperature: float  # that the tree is sampled at
    gold: str  # the answer; "": there is none
    mishap: Callable[[str, str], None]  # is told what failed: of which kind, and why

    async def closed(self, node: int, parent: str) -> None:
        """Put beside the sampled log-probabilities of MODEL node ``node``, which has closed, those of the
        weights that the engine holds now.  Where that fails, only the sampled ones are there.

        ``parent``: the request that wrote it, whose server holds the keys and values before it.
        """
        if own := self.growth.n_tokens(node):
            tokens = self.growth.path_tokens(node)
            if found := await self._score("rescore", tokens, tokens.size - own, parent):
                self.growth.rescore(node, found.logprob, found.version)

    async def answer(self, node: int, parent: str) -> None:
        """Score the gold answer's tokens, in the words in which it would be given, as if they came right
        behind PROMPT or TOOL node ``node``.  Unknown where that fails, and where the context has no room.

        ``parent``: the newest request on the way to the node.
        """
        if not self.gold:
            self.mishap("answer", f"prompt {self.prompt_id!r} has no gold answer to score")
            return
        words, first = self._answer
        before = self.growth.path_tokens(node)
        tokens = np.concatenate([before, words])
        if tokens.size < self.context.max_context and (
            found := await self._score("answer", tokens, before.size + first, parent)
        ):
            self.growth.answer(node, float(found.logprob.mean(dtype=np.float64)))

    async def answers(self, nodes: Sequence[int]) -> None:
        """:meth:`answer` behind each of ``nodes``, on the way to which nothing was generated."""
        for node in nodes:
            await self.answer(node, "")

    @cached_property
    def _answer(self) -> tuple[Int32, int]:
        """Tokens of the words in which the gold answer is given, and the number of the first of its own: one
        that a tokenizer makes of the last of the opening and the first of the answer is the answer's.
        """
        tokenizer, opening = self.context.tokenizer, self.context.config.answer_opening
        before, words = encode_text(tokenizer, opening), encode_text(tokenizer, opening + self.gold)
        both = min(before.size, words.size - 1)
        differs = np.flatnonzero(before[:both] != words[:both])
        return words, int(differs[0]) if differs.size else both

    async def _score(self, what: str, tokens: Int32, start: int, parent: str) -> Scores | None:
        """None, and a mishap, where the engine cannot: none of this is worth a tree."""
        rid = _request_id(self.prompt_id, what)
        try:
            async with AwakeTimeout(self.context.config.generate_deadline_s):
                return await score(
                    self.context.engine,
                    tokens,
                    start,
                    rid=rid,
                    temperature=self.temperature,
                    route=self.route,
                    parent=parent,
                )
        except (EngineError, TimeoutError) as error:
            self.mishap(what, described(error))
            return None


def _request_id(prompt_id: str, what: str) -> str:
    """A name that no other request has."""
    return f"{prompt_id}:{what}:{secrets.token_hex(6)}"
