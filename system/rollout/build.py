"""Puts the context of rollouts together from the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import AutoTokenizer

from system.config import Config
from system.engine.entropy import TopEntropy
from system.engine.pool import EnginePool
from system.plugins import REWARDS, SYNTAXES
from system.rollout.branching import make_policy
from system.rollout.context import RolloutContext
from system.tools.service import ToolService, build_tools


def build_context(
    config: Config, model_path: str, engines: Sequence[str], tools: Mapping[str, str]
) -> tuple[RolloutContext, ToolService, EnginePool]:
    """What a worker's rollouts need, and what they talk to: the engines at ``engines``, the tool servers at
    ``tools`` (tool -> URL).

    ``model_path`` is where the tokenizer lies.  Call inside a running event loop.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    service, top_k = build_tools(config.tools, tools), config.engine.entropy_top_k
    syntax = config.rollout.syntax
    engine = EnginePool(
        list(engines),
        deadline_s=config.rollout.generate_deadline_s,
        in_flight=config.engine.in_flight,
        estimate=TopEntropy(top_k, len(tokenizer)) if top_k else None,
    )
    context = RolloutContext(
        engine=engine,
        tools=service,
        syntax=SYNTAXES.make(syntax.name, syntax.options, service.specs),
        policy=make_policy(config.branching),
        reward=REWARDS.make(config.reward.name, config.reward.options, config=config),
        tokenizer=tokenizer,
        config=config.rollout,
        vocab_size=len(tokenizer),
    )
    return context, service, engine
