"""A synthetic agent: what a model would say, as lengths, tool calls, entropies and answers.

It speaks in tokens that only the twin's own tokenizer reads.  All tokens of a segment carry the segment's
number, so that the engine model can tell shared prefixes by looking at a path; the last token says how the
segment ends.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from system.rollout.reward import BranchView, Score
from system.tree.prompt import Prompt
from system.twin.dist import Constant, Dist, Lognormal

EOS, TEXT, RIGHT, WRONG = 0, 1, 2, 3  # TEXT: prompts and tool results
SEGMENT = 1 << 8  # tokens from here on are sampled: SEGMENT + number of the segment, ...
CALL = 1 << 30  # ... and from here on tool calls: CALL + (tool << _BITS) + a draw that names the call
_BITS = 20
SEGMENTS = CALL - SEGMENT
MOST_RECORDED = 1 << _BITS  # segments
MOST_CALLS = 1 << 8  # of a leaf, that are told apart


@dataclass(frozen=True, slots=True)
class Utterance:
    """What the agent says next."""

    tokens: int  # the last one or two of them say how it ends
    call: int  # the call's token, or 0: it answers
    right: bool
    entropy: float  # nats, of the first tokens after a tool result (or of the root's first)


class Agent(ABC):
    """What stands in for the model and the tasks."""

    draws_by_request: ClassVar[bool] = True  # what it says follows from the request's seed

    @property
    @abstractmethod
    def tools(self) -> Sequence[str]:
        """Tool names; a segment's call names one by its place here."""

    @abstractmethod
    def speak(self, seed: int, tree: str, calls: Sequence[int]) -> Utterance:
        """The segment that a request with this ``seed`` gets.

        ``tree``: its route, "prompt:ticket"; ``calls``: the call tokens on the branch so far, in order.
        """

    @abstractmethod
    def prompt_length(self, prompt_id: str) -> Dist:
        """Tokens of a prompt."""

    def forget(self, tree: str) -> None:
        """The tree is closed, or will never be."""
        return

    def query(self, call: int) -> int:
        """What the call of token ``call`` asks: two calls of one tree that ask the same have the same."""
        return number_of(call)

    def prompt(self, prompt_id: str, seed: int) -> Prompt:
        """A prompt whose text is its length."""
        rng = np.random.default_rng([seed, *prompt_id.encode()])
        length = max(1, round(self.prompt_length(prompt_id).draw(rng)))
        return Prompt(prompt_id, ({"role": "user", "content": str(length)},), ())


@dataclass(frozen=True)
class AgentModel(Agent):
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

    def speak(self, seed: int, tree: str, calls: Sequence[int]) -> Utterance:
        return self.say(np.random.default_rng(seed), calls)

    def say(self, rng: np.random.Generator, calls: Sequence[int]) -> Utterance:
        """A segment after ``calls``, drawn by ``rng``."""
        length = max(2, round(self.segment_tokens.draw(rng)))
        level = self.root_entropy + (self.rise if calls else 0.0)
        entropy = max(0.0, level + self.entropy_spread * rng.standard_normal())
        call = 0
        if rng.random() < self.p_call[min(len(calls), len(self.p_call) - 1)]:
            tool = int(self._upto.searchsorted(rng.random()))
            call = call_token(min(tool, self._upto.size - 1), int(rng.integers(1 << _BITS)))
        return Utterance(length, call, bool(rng.random() < self.p_right), entropy)

    @cached_property
    def _upto(self) -> NDArray[np.float64]:
        """Of the tools' shares of the calls, the sum up to each."""
        shares = np.fromiter(self.shares.values(), np.float64)
        return np.cumsum(shares / shares.sum())

    def prompt_length(self, prompt_id: str) -> Dist:
        return self.prompt_tokens


@dataclass(slots=True)
class _Leaves:
    """What a growing tree's leaves have said: one generator each, in the order in which they began."""

    draws: list[np.random.Generator] = field(default_factory=list[np.random.Generator])
    said: list[int] = field(default_factory=list[int])  # calls that each has made
    asked: dict[int, int] = field(default_factory=dict[int, int])  # calls not gone on from -> their leaf


@dataclass(frozen=True)
class LeafAgent(AgentModel):
    """The same habits, drawn by leaf: common random numbers for ways to grow the same trees.

    What the i-th leaf of a tree says and asks as its own k-th turn, and (by :mod:`.tools`) how long the tool
    takes, is the same whether it began as a root or as a fork.  So where one way meets a slow call, the other
    meets it in the same tree, if it comes to that turn at all: a fork needs fewer turns than a root.

    Of the requests that go on from a call the first is the caller's own, and each other one a fork's.
    """

    seed: int = 0
    draws_by_request: ClassVar[bool] = False
    _trees: dict[str, _Leaves] = field(
        default_factory=dict[str, _Leaves], init=False, repr=False, compare=False
    )

    def speak(self, seed: int, tree: str, calls: Sequence[int]) -> Utterance:
        leaves = self._trees.get(tree) or self._trees.setdefault(tree, _Leaves())
        leaf = leaves.asked.pop(calls[-1], None) if calls else None
        if leaf is None:
            leaf = len(leaves.draws)
            leaves.draws.append(np.random.default_rng([self.seed, leaf, *tree.encode()]))
            leaves.said.append(0)
        segment = self.say(leaves.draws[leaf], calls)
        if not segment.call:
            return segment
        call = call_token(tool_of(segment.call), leaf * MOST_CALLS + leaves.said[leaf])
        leaves.said[leaf] += 1
        leaves.asked[call] = leaf
        return replace(segment, call=call)

    def forget(self, tree: str) -> None:
        self._trees.pop(tree, None)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A segment that a run has seen."""

    tokens: int
    tool: int  # it called; -1: it ended
    query: int  # what it asked: equal for equal calls of one tree
    right: bool
    entropy: float
    next: Sequence[int] = ()  # numbers of the segments that followed its call


@dataclass(frozen=True, slots=True)
class RecordedTree:
    prompt_tokens: int
    levels: Sequence[Sequence[int]]  # numbers of its segments, by the calls before them


class RecordedAgent(Agent):
    """Says again what was said in a run: every tree retells a recorded one.

    A prompt gets one of the recorded trees.  Its branches begin with first segments of that tree and go on
    with what followed the same call there.  So what the branches of a tree have in common (a question that
    needs three searches needs them on every branch) stays in common: a tree lasts as long as its longest
    branch, and were the branches independent, the longest would be longer.

    Each tree says a segment once.  Where all k segments that followed a call are said, the branch repeats one
    with probability k / (k + variety); else it goes on, in the same way, with what the tree said elsewhere
    after as many calls, and in the end with what any tree did: draws from a hierarchical Dirichlet process
    (Teh et al. 2006, section 4).  So more branches than were recorded bring something new.

    A call's token names its segment.
    """

    def __init__(
        self,
        trees: Sequence[RecordedTree],
        segments: Sequence[Recorded],
        tools: Sequence[str],
        variety: float,
    ) -> None:
        """``segments``: at most ``MOST_RECORDED``; ``variety``: 0 where a tree's branches are all alike,
        infinite where they are independent."""
        if not trees or len(segments) > MOST_RECORDED:
            raise ValueError(
                f"{len(trees)} trees, {len(segments)} segments: 1 to {MOST_RECORDED:,} can be told"
            )
        self.trees, self.segments, self._tools, self.variety = trees, segments, tools, variety
        self.levels = [  # numbers of all trees' segments, by the calls before them
            [number for tree in trees for level in tree.levels[calls : calls + 1] for number in level]
            for calls in range(max(len(tree.levels) for tree in trees))
        ]
        self._said: dict[str, set[int]] = {}  # by each tree that grows; nothing when a simulation is over

    @property
    def tools(self) -> Sequence[str]:
        return self._tools

    def speak(self, seed: int, tree: str, calls: Sequence[int]) -> Utterance:
        said = self._said.setdefault(tree, set())
        number = self._choose(
            np.random.default_rng(seed), said, self._recorded(tree.rpartition(":")[0]), calls
        )
        said.add(number)
        segment = self.segments[number]
        call = call_token(segment.tool, number) if segment.tool >= 0 else 0
        return Utterance(max(2, segment.tokens), call, segment.right, segment.entropy)

    def _choose(
        self, rng: np.random.Generator, said: set[int], tree: RecordedTree, calls: Sequence[int]
    ) -> int:
        depth = len(calls)
        here = self.segments[number_of(calls[-1])].next if calls else ()
        for numbers in (here, *tree.levels[depth : depth + 1]):
            if left := [number for number in numbers if number not in said]:
                return left[int(rng.integers(len(left)))]
            if rng.random() * (len(numbers) + self.variety) < len(numbers):
                return numbers[int(rng.integers(len(numbers)))]
        numbers = self.levels[min(depth, len(self.levels) - 1)]
        return numbers[int(rng.integers(len(numbers)))]

    def forget(self, tree: str) -> None:
        self._said.pop(tree, None)

    def query(self, call: int) -> int:
        return self.segments[number_of(call)].query

    def prompt_length(self, prompt_id: str) -> Dist:
        return Constant(self._recorded(prompt_id).prompt_tokens)

    def _recorded(self, prompt_id: str) -> RecordedTree:
        return self.trees[zlib.crc32(prompt_id.encode()) % len(self.trees)]


def call_token(tool: int, number: int) -> int:
    """A call of tool number ``tool``; ``number`` [0, 2^20) tells such calls apart."""
    return CALL + (tool << _BITS) + number


def number_of(call: int) -> int:
    return call & ((1 << _BITS) - 1)


def written(segment: Utterance, number: int, limit: int) -> NDArray[np.int32]:
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

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def encode(self, text: str, **_: Any) -> NDArray[np.int32]:
        return np.full(int(text) if text.isdigit() else 1, TEXT, np.int32)

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """Only the end of a segment says anything: a call in tags, or the answer."""
        last = ids[-1] if len(ids) else TEXT
        if last >= CALL:
            name = self._agent.tools[tool_of(last)]
            return f"<{name}> {self._agent.query(last)} </{name}>"
        return {RIGHT: "right", WRONG: "wrong"}.get(last, "")


class AnswerReward:
    """1 for the right answer, 0 for any other end."""

    def score(self, prompt: Prompt, branch: BranchView) -> Score:
        right = branch.segments[-1][1] == "right" if branch.segments else False
        return Score(float(right), right)
