"""A synthetic agent: what a model would say, as lengths, tool calls, entropies and answers.

It speaks in tokens that only the twin's own tokenizer reads.  All tokens of a segment carry the segment's
number, so that the engine model can tell shared prefixes by looking at a path; the last token says how the
segment ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from system.bench.twin.dist import Constant, Dist, Lognormal
from system.rollout.reward import BranchView, Score
from system.tasks.base import Prompt

EOS, TEXT, RIGHT, WRONG = 0, 1, 2, 3  # TEXT: prompts and tool results
SEGMENT = 1 << 8  # tokens from here on are sampled: SEGMENT + number of the segment, ...
CALL = 1 << 30  # ... and from here on tool calls: CALL + (tool << _BITS) + a draw that names the call
_BITS = 20
SEGMENTS = CALL - SEGMENT


@dataclass(frozen=True, slots=True)
class Segment:
    """What the agent says next."""

    tokens: int  # the last one or two of them say how it ends
    call: int  # the call's token, or 0: it answers
    right: bool
    entropy: float  # nats, of the first tokens after a tool result (or of the root's first)


class Agent(Protocol):
    """What stands in for the model and the tasks."""

    @property
    def tools(self) -> Sequence[str]:
        """Tool names; a segment's call names one by its place here."""
        ...

    def speak(self, seed: int, calls: int) -> Segment:
        """The segment that a request with this ``seed`` gets after ``calls`` tool calls."""
        ...

    def prompt(self, prompt_id: str, seed: int) -> Prompt:
        """A prompt whose text is its length."""
        ...


@dataclass(frozen=True)
class AgentModel:
    """An agent's habits.  Every draw comes from the request's own seed: the order of events is no matter."""

    prompt_tokens: Dist = field(default_factory=lambda: Constant(256))
    segment_tokens: Dist = field(default_factory=lambda: Lognormal(128, 0.5))  # model tokens up to a stop
    p_call: tuple[float, ...] = (0.7,)  # chance that a segment ends in a call, by calls so far (last repeats)
    shares: Mapping[str, float] = field(default_factory=lambda: {"search": 1.0})  # of the calls, by tool
    root_entropy: float = 0.5  # nats; mean and spread over segments
    rise: float = 0.1  # mean of ΔH after a tool result, nats
    entropy_spread: float = 0.2
    p_right: float = 0.5

    @property
    def tools(self) -> Sequence[str]:
        return list(self.shares)

    def speak(self, seed: int, calls: int) -> Segment:
        rng = np.random.default_rng(seed)
        length = max(2, round(self.segment_tokens.draw(rng)))
        level = self.root_entropy + (self.rise if calls else 0.0)
        entropy = max(0.0, level + self.entropy_spread * rng.standard_normal())
        call = 0
        if rng.random() < self.p_call[min(calls, len(self.p_call) - 1)]:
            shares = np.fromiter(self.shares.values(), np.float64)
            tool = int(np.searchsorted(np.cumsum(shares / shares.sum()), rng.random()))
            call = call_token(min(tool, shares.size - 1), rng)
        return Segment(length, call, bool(rng.random() < self.p_right), entropy)

    def prompt(self, prompt_id: str, seed: int) -> Prompt:
        return _prompt(prompt_id, seed, self.prompt_tokens)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A segment that a run has seen."""

    tokens: int
    tool: int  # it called; -1: it ended
    right: bool
    entropy: float


@dataclass(frozen=True)
class RecordedAgent:
    """Says again what was said in a run: a segment drawn from those after as many tool calls.

    Length, call and entropy are drawn together, so what goes together in the run goes together here; what
    two segments of one branch have in common is lost.
    """

    prompt_tokens: Dist
    segments: Sequence[Sequence[Recorded]]  # by calls so far; the last entry serves all further ones
    tools: Sequence[str]

    def speak(self, seed: int, calls: int) -> Segment:
        rng = np.random.default_rng(seed)
        heard = self.segments[min(calls, len(self.segments) - 1)]
        one = heard[int(rng.integers(len(heard)))]
        call = call_token(one.tool, rng) if one.tool >= 0 else 0
        return Segment(max(2, one.tokens), call, one.right, one.entropy)

    def prompt(self, prompt_id: str, seed: int) -> Prompt:
        return _prompt(prompt_id, seed, self.prompt_tokens)


def _prompt(prompt_id: str, seed: int, tokens: Dist) -> Prompt:
    rng = np.random.default_rng([seed, *prompt_id.encode()])
    length = max(1, round(tokens.draw(rng)))
    return Prompt(prompt_id, ({"role": "user", "content": str(length)},), ())


def call_token(tool: int, rng: np.random.Generator) -> int:
    """A call of tool number ``tool``, with a draw that names it."""
    return CALL + (tool << _BITS) + int(rng.integers(1 << _BITS))


def written(segment: Segment, number: int, limit: int) -> NDArray[np.int32]:
    """[≤ limit] the tokens of ``segment``, which is segment ``number`` of the simulation."""
    tokens = np.full(segment.tokens, SEGMENT + number % SEGMENTS, np.int32)
    if segment.call:
        tokens[-1] = segment.call
    else:
        tokens[-2:] = (RIGHT if segment.right else WRONG), EOS
    return tokens[:limit]


def tool_of(call: int) -> int:
    """Number of the tool that token ``call`` calls."""
    return (call - CALL) >> _BITS


class TwinTokenizer:
    """Text made of lengths: a number stands for so many tokens, any other text for one."""

    eos_token_id = EOS
    chat_template = None

    def __init__(self, tools: Sequence[str]) -> None:
        self._tools = list(tools)

    def encode(self, text: str, **_: Any) -> NDArray[np.int32]:
        return np.full(int(text) if text.isdigit() else 1, TEXT, np.int32)

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """Only the end of a segment says anything: a call in tags, or the answer."""
        last = ids[-1] if len(ids) else TEXT
        if last >= CALL:
            name = self._tools[tool_of(last)]
            return f"<{name}> {last - CALL} </{name}>"
        return {RIGHT: "right", WRONG: "wrong"}.get(last, "")


class AnswerReward:
    """1 for the right answer, 0 for any other end."""

    def score(self, prompt: Prompt, branch: BranchView) -> Score:
        right = branch.segments[-1][1] == "right" if branch.segments else False
        return Score(float(right), right)
