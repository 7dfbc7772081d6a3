"""Fakes for the rollouts, in virtual time: a tokenizer of whole pieces, a scripted engine, scripted tools."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from system.config import RolloutConfig
from system.engine.protocol import Chunk, EngineError, Finish, GenerateRequest
from system.plugins import SYNTAXES
from system.rollout.branching import Arpo, Policy
from system.rollout.context import RolloutContext
from system.rollout.reward import BranchView, Reward, Score
from system.rollout.scorer import Scorer
from system.rollout.scoring import Scoring
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec, ToolStatus
from system.tree.prompt import Prompt

SPECS = {
    "search": ToolSpec("search", "look something up", {"type": "object"}, "query", pure=True),
    "python": ToolSpec("python", "run code", {"type": "object"}, "code"),
}


class PieceTokenizer:
    """One token per tag, word or run of white space, numbered as they come; decoding is concatenation."""

    eos_token_id = 0
    chat_template = None

    def __init__(self) -> None:
        self.pieces = ["<eos>"]
        self.ids = {"<eos>": 0}

    def encode(
        self, text: str, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> list[int]:
        text.encode()  # the real ones raise for a lone surrogate, too
        found = re.findall(r"</?\w+>|<\|\w+\|>|\s+|\w+|[^\w\s]", text)
        if split_special_tokens:
            found = ["?" if piece == "<eos>" else piece for piece in found]
        for piece in found:
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
        return [self.ids[piece] for piece in found]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(self.pieces[i] for i in ids)


@dataclass
class Segment:
    """What a scripted model says next."""

    text: str  # a closing tool tag at its end stops it; otherwise it ends with EOS
    entropy: Sequence[float] | float = 1.0  # nats, per token (the last one repeats)
    first_s: float = 0.5  # seconds until the first token
    after: asyncio.Event | None = None  # without which there is none
    token_s: float = 0.01  # seconds per further token
    chunk: int = 3  # tokens per chunk
    fail_after: int | None = None  # EngineError after so many tokens
    hang_after: int | None = None  # never another token after so many


Scores = Callable[[GenerateRequest, int], Any]
"""(a request to score given tokens, how many came before it) -> their log-probabilities."""
Script = Callable[[str, np.random.Generator], Segment]
"""(text after the prompt, a generator seeded by the request) -> what the model says next."""


@dataclass
class ScriptedEngine:
    """Streams what the script says.  Deterministic in (prompt tokens, seed)."""

    tokenizer: Any  # a PieceTokenizer, or a real one
    script: Script
    prompt_text: str
    running: int = 0
    requests: list[GenerateRequest] = field(default_factory=list)
    scored: list[GenerateRequest] = field(default_factory=list)
    closed_early: int = 0
    streamed: int = 0
    end: int = 0  # token that ends a turn
    score_s: float = 0.2  # seconds for a score
    scores: Scores = lambda asked, call: -np.arange(asked.score_from, asked.input_ids.size) / 1000

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        if request.score_from is not None:
            async for chunk in self._score(request):
                yield chunk
            return
        self.requests.append(request)
        self.running += 1
        finished = False
        try:
            text = self.tokenizer.decode(request.input_ids.tolist())
            said = self.script(
                text.removeprefix(self.prompt_text), np.random.default_rng(request.sampling.seed)
            )
            ids = self.tokenizer.encode(said.text)
            matched: str | int | None = next(
                (s for s in request.sampling.stop if said.text.endswith(s)), None
            )
            if matched is None:
                ids, matched = [*ids, self.end], self.end
            finish = Finish("stop", matched)
            if len(ids) > request.sampling.max_new_tokens:
                ids, finish = ids[: request.sampling.max_new_tokens], Finish("length")
            levels = [said.entropy] if isinstance(said.entropy, float | int) else list(said.entropy)
            await asyncio.sleep(said.first_s)
            if said.after is not None:
                await said.after.wait()
            for begin in range(0, len(ids), said.chunk):
                part = ids[begin : begin + said.chunk]
                end = begin + len(part)
                if said.fail_after is not None and end > said.fail_after:
                    raise EngineError("scripted failure")
                if said.hang_after is not None and end > said.hang_after:
                    await asyncio.Event().wait()
                if begin:
                    await asyncio.sleep(said.token_s * len(part))
                self.streamed += len(part)
                yield Chunk(
                    tokens=np.array(part, np.int32),
                    logprob=np.full(len(part), -0.5, np.float32),
                    entropy=np.array(
                        [levels[min(i, len(levels) - 1)] for i in range(begin, end)], np.float32
                    ),
                    version=np.full(len(part), 7, np.int32),
                    finish=finish if end == len(ids) else None,
                )
            finished = True
        finally:
            self.running -= 1
            self.closed_early += not finished

    async def _score(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """A token, and ``scores`` of the given ones: an array, an error to raise, None for never."""
        self.scored.append(request)
        found = self.scores(request, len(self.scored) - 1)
        self.running += 1
        try:
            await asyncio.sleep(self.score_s)
            if found is None:
                await asyncio.Event().wait()
            if isinstance(found, Exception):
                raise found
            one, none = np.zeros(1, np.float32), np.zeros(1, np.int32)
            scores = np.asarray(found, np.float32)
            yield Chunk(none, one, one, np.full(1, 9, np.int32), Finish("length"), scores=scores)
        finally:
            self.running -= 1


Answer = Callable[[str, Mapping[str, Any]], tuple[float, ToolOutcome]]


@dataclass
class ScriptedTools:
    """Answers after a delay: (seconds, outcome) = answer(tool, arguments)."""

    answer: Answer
    specs: Mapping[str, ToolSpec] = field(default_factory=lambda: SPECS)
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    contexts: list[CallContext] = field(default_factory=list)
    running: int = 0

    async def call(self, tool: str, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        self.calls.append((tool, dict(arguments)))
        self.contexts.append(context)
        self.running += 1
        try:
            seconds, outcome = self.answer(tool, arguments)
            await asyncio.sleep(seconds)
            return outcome
        finally:
            self.running -= 1


class CountWords:
    """A reward that has nothing to do with answers: the number of pieces the model wrote."""

    def score(self, prompt: Prompt, branch: BranchView) -> Score:
        return Score(float(len(branch.model_text.split())), True, {"calls": float(len(branch.tools))})


def ok(text: str = "found it", seconds: float = 1.0) -> tuple[float, ToolOutcome]:
    return seconds, ToolOutcome(ToolStatus.OK, text, seconds)


PROMPT = Prompt("p1", ({"role": "user", "content": "who?"},), ("me",), kind="lookup")


@dataclass
class World:
    """A rollout with its fakes at hand."""

    context: RolloutContext
    engine: ScriptedEngine
    tools: ScriptedTools
    tokenizer: Any  # the engine's

    def text(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode(tokens.tolist())


def make_world(
    script: Script,
    answer: Answer = lambda tool, arguments: ok(),
    *,
    policy: Policy | None = None,
    reward: Reward | None = None,
    failure_limit: float = 1.0,
    syntax: str = "tags",
    vocab_size: int = 100,
    **config: Any,
) -> World:
    tokenizer = PieceTokenizer()
    engine = ScriptedEngine(tokenizer, script, PROMPT.messages[0]["content"])
    tools = ScriptedTools(answer)
    context = RolloutContext(
        engine=engine,
        tools=tools,
        syntax=SYNTAXES.make(syntax, {}, tools.specs),
        policy=policy or Arpo(4, 0.5, 0.2),
        scoring=Scoring([Scorer(reward or CountWords())], failure_limit=failure_limit),
        tokenizer=tokenizer,
        config=RolloutConfig(**config),
        vocab_size=vocab_size,
        now=lambda: 1000.0,
    )
    return World(context, engine, tools, tokenizer)
