"""What rollouts are made with: the engine, the tools, the policy and the rest, the same for all trees."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from system.config import Config, GuideConfig, RolloutConfig
from system.engine.entropy import TopEntropy
from system.engine.pool import EnginePool
from system.engine.protocol import Engine
from system.engine.routes import RouteFormat
from system.envs.protocol import Message
from system.envs.service import Environments
from system.http import Keys
from system.models.shape import vocabulary
from system.rollout.branching import Policy, make_policy
from system.rollout.chat import Chat, Told, make_chat, make_syntax
from system.rollout.drift import HistoryDrift
from system.rollout.encode import Tokenizer, encode_text, fitted, local_tokenizer
from system.rollout.failure import RolloutFailed
from system.rollout.schedule import Schedule, make_schedule
from system.rollout.scoring import Scoring
from system.rollout.syntax.base import Syntax
from system.rollout.teacher import Teacher, spelling
from system.tools.outcome import Tools
from system.tools.service import ToolService, build_tools
from system.tree.builder import TreeBuilder
from system.tree.prompt import Prompt
from system.tree.record import Int32

CHARS_PER_TOKEN = 32  # a tool's answer is cut to this many characters per allowed token before it is encoded
SGLANG_KEEPS = 8  # tokens of its context, at least: it refuses a request that would fill all of it


@dataclass(frozen=True)
class RolloutContext:
    """Serves any number of growing trees; of these it knows only where their schedule stands."""

    engine: Engine
    tools: Tools
    syntax: Syntax
    policy: Policy
    scoring: Scoring
    tokenizer: Tokenizer
    config: RolloutConfig
    vocab_size: int  # V, of which ln V is the unit of entropy
    now: Callable[[], float] = time.time  # unix time, for the record
    max_context: int = sys.maxsize  # tokens of a sequence, prompt included, that the engine takes
    asks: Chat | None = None  # None: the messages of a prompt as they are
    guide: GuideConfig = field(default_factory=GuideConfig)  # how a guided tree's prompt tells the actions
    environments: Environments | None = None  # None: the tools keep no state
    teacher: Teacher | None = None  # None: no server teaches
    routes: bool = False  # the engine is asked which experts each token went through
    schedule: Schedule = field(init=False)  # config.schedule, over all trees
    drift: HistoryDrift = field(init=False)

    def __post_init__(self) -> None:
        wrapping = self._overhead
        if self.config.max_tool_result_tokens <= wrapping:
            raise ValueError(
                f"rollout.max_tool_result_tokens={self.config.max_tool_result_tokens}: "
                f"the result's own tags take {wrapping} tokens"
            )
        object.__setattr__(self, "drift", HistoryDrift(self.chat))
        object.__setattr__(self, "schedule", make_schedule(self.config.schedule))

    @cached_property
    def chat(self) -> Chat:
        """How the model is asked."""
        return self.asks or Chat(self.tokenizer)

    @property
    def several_calls(self) -> bool:
        """Whether a turn may make several calls; it ends at its own end then, not at the first of them."""
        return self.config.calls_per_turn == "many"

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which generation stops."""
        return () if self.several_calls else self.syntax.stops

    @cached_property
    def _wrapping(self) -> tuple[Int32, Int32]:
        """Tokens before and after a tool's answer."""
        return self._around(self.syntax.result_open, self.syntax.result_close)

    @cached_property
    def _overhead(self) -> int:
        """Tokens around a tool's answer."""
        if (codec := self.chat.codec) and self.syntax.specs:
            return codec.overhead(("tool",))
        return sum(tokens.size for tokens in self._wrapping)

    @cached_property
    def _message_wrapping(self) -> tuple[Int32, Int32]:
        """Tokens before and after what a user says."""
        return self._around(self.syntax.message_open, self.syntax.message_close)

    def _around(self, before: str, after: str) -> tuple[Int32, Int32]:
        if self.syntax.new_turn:
            after += self.chat.opened
        return encode_text(self.tokenizer, before), encode_text(self.tokenizer, after)

    def encode_prompt(self, prompt: Prompt, guide: int = 0) -> Int32:
        """Token ids of a question as the model is asked, with the first ``guide`` actions of its
        demonstration.

        Raises :class:`PromptError`, and :class:`RolloutFailed` for one that leaves no room for a response.
        """
        tokens = self.chat.encode(prompt.messages, self._hint(prompt, guide))
        if tokens.size >= self.max_context:
            fault = f"{tokens.size} tokens, and engine.max_context leaves room for {self.max_context}"
            raise RolloutFailed(prompt.id, "prompt_too_long", f"{fault}: raise it, or take the question out")
        return tokens

    def told(self, prompt: Prompt, guide: int = 0) -> Told:
        """What :meth:`encode_prompt` makes tokens of."""
        return self.chat.told(prompt.messages, self._hint(prompt, guide))

    def _hint(self, prompt: Prompt, guide: int) -> str:
        return self.guide.told(prompt.actions[:guide]) if guide else ""

    def plant(self, prompt: Prompt, budget: int, guide: int = 0) -> TreeBuilder:
        """A tree of nothing but its prompt, and, with a ``guide``, of the one that is sampled from.

        Raises as :meth:`encode_prompt` does.
        """
        return TreeBuilder(
            prompt.id,
            prompt.kind,
            self.encode_prompt(prompt),
            budget,
            started_s=self.now(),
            guide=guide,
            sampled_prompt=self.encode_prompt(prompt, guide) if guide else (),
            clock=self.now,
        )

    def heard(self, messages: Sequence[Message]) -> tuple[dict[str, str], ...]:
        """``messages`` as a chat template gets them: long ones are cut."""
        return tuple({"role": one.role, "content": self._fitted(one.text)} for one in messages)

    def encode_answer(self, messages: Sequence[Message], room: int, *, ended: bool) -> Int32:
        """Token ids of what the model reads after its turn, one message behind the other, at most ``room``.
        ``ended``: the turn's last token is one that ends it.

        Only here does an answer become tokens.  Raises :class:`.TemplateRefused` for messages that the chat
        template has no exact form for.
        """
        if codec := self.chat.codec:
            if not messages:
                return np.empty(0, np.int32)
            return codec.increment(self.heard(messages), ended=ended)[:room]
        parts = [self._encode_message(message, room) for message in messages]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int32), *parts])[:room]

    def _encode_message(self, message: Message, room: int) -> Int32:
        wrapping = self._message_wrapping if message.role == "user" else self._wrapping
        return self._wrapped(message.text, wrapping, room)

    def _fitted(self, text: str) -> str:
        """The beginning of ``text`` that has room in an answer.  (A template that writes it as JSON makes
        more tokens of it.)
        """
        limit = self.config.max_tool_result_tokens
        return fitted(self.tokenizer, text[: limit * CHARS_PER_TOKEN], limit - self._overhead)

    def _wrapped(self, text: str, wrapping: tuple[Int32, Int32], room: int) -> Int32:
        limit = self.config.max_tool_result_tokens
        before, after = wrapping
        inner = encode_text(self.tokenizer, text[: limit * CHARS_PER_TOKEN], trusted=False)
        return np.concatenate([before, inner[: limit - before.size - after.size], after])[:room]


def build_context(
    config: Config,
    model_path: str,
    engines: Sequence[str],
    tools: Mapping[str, str],
    keys: Keys,
    store: Path | None = None,
) -> tuple[RolloutContext, ToolService, EnginePool]:
    """What a worker's rollouts need, and what they talk to: the engines at ``engines``, the tool servers at
    ``tools`` (tool -> URL), which want to be shown ``keys``.

    ``model_path`` is where the tokenizer lies; ``store``: what rewards and tools keep for a
    resumed run goes below it.
    Call inside a running event loop.
    """
    tokenizer = local_tokenizer(model_path)
    teaches = bool(config.teacher.urls)
    service, top_k = build_tools(config.tools, tools, keys.tools, store), config.engine.entropy_top_k
    environments = Environments.of(config)
    environment = environments.train.environment if environments else None
    syntax = make_syntax(config, service.specs, environment)
    routes = RouteFormat.of_directory(model_path) if config.rollout.replay_routes else None
    engine = EnginePool(
        list(engines),
        deadline_s=config.rollout.generate_deadline_s,
        in_flight=config.engine.in_flight,
        estimate=TopEntropy(top_k, len(tokenizer)) if top_k else None,
        vocab=max(len(tokenizer), vocabulary(model_path)),
        key=keys.engines,
        routes=routes,
        channel=config.engine.name == "embedded",
    )
    # A score of the whole sequence comes with one more token.
    kept = SGLANG_KEEPS if config.engine.name == "sglang" else int(config.rollout.rescore or teaches)
    longest = config.engine.max_context - kept
    context = RolloutContext(
        engine=engine,
        tools=service,
        syntax=syntax,
        policy=make_policy(config.branching),
        scoring=Scoring.of(config, keys.rewards.get, store),
        tokenizer=tokenizer,
        config=config.rollout,
        vocab_size=len(tokenizer),
        max_context=longest,
        asks=make_chat(config, tokenizer, model_path, syntax, environment),
        guide=config.guide,
        environments=environments,
        teacher=Teacher(config.teacher, len(tokenizer), longest, keys.teacher, spelling(tokenizer))
        if teaches
        else None,
        routes=routes is not None,
    )
    return context, service, engine
