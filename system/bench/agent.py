"""A synthetic agent for the virtual clock: an engine of limited capacity, tools, and a tokenizer for both.

What the agent says follows from the request's sampling seed alone, so the same branch says the same whatever
the schedule.  Tokens: 0 ends the sequence, 1 is any word, 2 + q is the call ``<search> q </search>``, whose
number q names the call and so its latency.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from system.bench.latency import ToolLatency
from system.engine.protocol import Chunk, Finish, GenerateRequest
from system.rollout.reward import BranchView, Score
from system.tasks.base import Prompt
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec, ToolStatus

EOS, WORD, FIRST_CALL = 0, 1, 2
STOP = "</search>"
SPECS = {"search": ToolSpec("search", "look something up", {"type": "object"}, "query", pure=True)}


class CriticalPath:
    """Seconds of work on the longest chain of segments and calls that had to follow each other.

    A task inherits its creator's context, so a fork goes on from its parent's chain and a top-up from the
    chain of the branch whose end made room for it.
    """

    def __init__(self) -> None:
        self.seconds = 0.0  # of the longest chain so far
        self._chain: ContextVar[float] = ContextVar("chain", default=0.0)

    def add(self, seconds: float) -> None:
        """The current task did ``seconds`` of work."""
        chain = self._chain.get() + seconds
        self._chain.set(chain)
        self.seconds = max(self.seconds, chain)


@dataclass(frozen=True)
class Says:
    """The distribution of what the agent says in one segment."""

    p_call: float = 0.5  # chance that a segment ends in a tool call
    tokens: float = 120.0  # mean length
    sigma: float = 0.5  # of ln(length); 0: all segments are equally long
    entropy_s: float = 0.0  # spread of the mean token entropy from segment to segment, nats (around 1)

    def segment(self, seed: int) -> tuple[int, int, float]:
        """(tokens, last token, entropy of its tokens) of the segment that ``seed`` draws."""
        rng = np.random.default_rng(seed)
        last = FIRST_CALL + int(rng.integers(2**30)) if rng.random() < self.p_call else EOS
        scale = np.exp(self.sigma * rng.standard_normal() - self.sigma**2 / 2) if self.sigma else 1.0
        entropy = 1.0 + self.entropy_s * float(rng.standard_normal()) if self.entropy_s else 1.0
        return max(1, round(self.tokens * float(scale))), last, max(entropy, 0.0)


@dataclass
class SimulatedEngine:
    """Decodes at most ``slots`` sequences at once, each at the same speed; the others queue, first come first
    served."""

    says: Says
    window: int  # tokens of the first chunk: what a branching policy looks at
    slots: int = 2**30
    token_s: float = 0.02  # seconds per token of one sequence
    path: CriticalPath = field(default_factory=CriticalPath)
    busy_s: float = 0.0  # slot-seconds of decoding

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.slots)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        assert request.sampling.seed is not None
        count, last, entropy = self.says.segment(request.sampling.seed)
        finish = Finish("stop", EOS if last == EOS else STOP)
        if count > request.sampling.max_new_tokens:
            count, last, finish = request.sampling.max_new_tokens, WORD, Finish("length")
        async with self._slots:
            begin = 0
            while begin < count:
                size = min(self.window, count - begin) if begin == 0 else count - begin
                await self._decode(size)
                begin += size
                yield _chunk(size, last if begin == count else WORD, entropy, finish, begin == count)

    async def _decode(self, tokens: int) -> None:
        seconds = tokens * self.token_s
        await asyncio.sleep(seconds)
        self.busy_s += seconds
        self.path.add(seconds)

    async def abort(self, rid: str) -> None:
        raise AssertionError("closing the stream is how a grower aborts")


def _chunk(size: int, last: int, entropy: float, finish: Finish, end: bool) -> Chunk:
    tokens = np.full(size, WORD, np.int32)
    tokens[-1] = last
    return Chunk(
        tokens=tokens,
        logprob=np.full(size, -1.0, np.float32),
        entropy=np.full(size, entropy, np.float32),
        version=np.zeros(size, np.int32),
        finish=finish if end else None,
    )


@dataclass
class SimulatedTools:
    """One tool; each call takes the time that its query draws."""

    latency: ToolLatency
    path: CriticalPath = field(default_factory=CriticalPath)
    specs: Mapping[str, ToolSpec] = field(default_factory=lambda: SPECS)
    calls: int = 0

    async def call(self, tool: str, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        self.calls += 1
        seconds = self.latency.draw(int(arguments["query"]))
        await asyncio.sleep(seconds)
        self.path.add(seconds)
        return ToolOutcome(ToolStatus.OK, "found", seconds)


class AgentTokenizer:
    """Words are all alike; only calls keep their meaning."""

    eos_token_id = EOS
    chat_template = None

    def encode(self, text: str, **_: Any) -> list[int]:
        return [WORD] * max(1, len(text.split()))

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        calls = [f"<search> {token - FIRST_CALL} {STOP}" for token in ids if token >= FIRST_CALL]
        return " ".join(["w", *calls])


class NoReward:
    """Every branch is worth the same: what is measured is time."""

    def score(self, prompt: Prompt, branch: BranchView) -> Score:
        return Score(0.0, False, {})
